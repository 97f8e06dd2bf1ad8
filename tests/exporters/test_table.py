"""The table of one step, as people read it."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from records import GIB, PEAK_ENTRIES, breakdown, counted_step, steps, traced_step
from rich.console import Console

from memtrace.exporters.table import MAX_COMPONENTS, render_text, step_table
from memtrace.record.breakdown import EntryKey, StepRecord
from memtrace.record.categories import COLOURS, Category, Moment
from memtrace.record.units import MIB

TRACED = """\
step 12 · rank 1 · cuda:1 · traced · batch 8 x 512, 4,096 tokens · 330 ms · memtrace took 0.4 ms

                                   step            share of
sizes in GiB                        end      peak      peak
───────────────────────────────────────────────────────────────────────────────
■ weights  trainable bfloat16      2.00      2.00     10.8%  ████▌
■ master_weights  float32          4.00      4.00     21.6%  █████████
■ gradients  bfloat16                 -      1.00      5.4%  ██▎
■ optimizer_state                  8.00      8.00     43.2%  ██████████████████
    exp_avg float32                4.00      4.00     21.6%
    exp_avg_sq float32             4.00      4.00     21.6%
■ activations  bfloat16               -      3.00     16.2%  ██████▊
■ inputs  int64                       -     <0.01     <0.1%
■ temporaries  backward               -      0.50      2.7%  █▏
■ unattributed                        -         -

total                             14.00     18.50
allocated, counted apart          14.00     18.50

allocator  allocated 14.00 GiB · reserved 20.00 GiB · slack 6.00 GiB
device     total 80.00 GiB · used 24.00 GiB · free 56.00 GiB · this process 21.00 GiB · non-torch
           1.00 GiB · other processes 3.00 GiB"""

COUNTED = """\
step 13 · rank 1 · cuda:1 · counted · batch 8 x 512, 4,096 tokens · 330 ms · memtrace took 0.4 ms

                                    step
                                     end  share of
sizes in GiB                   estimated  step end
──────────────────────────────────────────────────────────────────────
■ weights  trainable bfloat16       2.00    100.0%  ██████████████████
■ unattributed

total                               2.00
allocated, counted apart            2.00"""


def line_of(record: StepRecord, start: str, width: int = 100) -> str:
    """Returns the first line of the table that begins so."""
    return next(line for line in render_text(record, width).splitlines() if line.strip().startswith(start))


def coloured(record: StepRecord) -> str:
    """Returns the table as a terminal with all colours gets it."""
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system="truecolor", _environ={})
    with console.capture() as capture:
        console.print(step_table(record))
    return capture.get()


def ansi(colour: str) -> str:
    """Returns the escape code of a foreground colour."""
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return f"38;2;{red};{green};{blue}"


def test_a_traced_step() -> None:
    """Categories by moments, with components, shares, sums and the readings of allocator and device."""
    assert render_text(traced_step()) == TRACED


def test_a_counted_step() -> None:
    """What only a trace can see is blank, not 0; estimates are marked; shares are of the last moment there is."""
    assert render_text(counted_step(allocator=None, device_memory=None)).rstrip() == COUNTED


def test_what_is_offloaded_is_listed_apart() -> None:
    """By category, below the device: it is no part of the moments. Step counters alone are not worth a line."""
    host = {
        EntryKey(Category.MASTER_WEIGHTS, "", "float32"): 4 * GIB,
        EntryKey(Category.OPTIMIZER_STATE, "exp_avg", "float32"): 4 * GIB,
        EntryKey(Category.OPTIMIZER_STATE, "exp_avg_sq", "float32"): 4 * GIB,
    }
    line = line_of(traced_step(host=host), "on the host")
    assert line.split("  ", 1)[1].strip() == "master_weights 4.00 GiB · optimizer_state 8.00 GiB"
    assert render_text(traced_step(host={EntryKey(Category.OPTIMIZER_STATE, "step", "float32"): 4096})) == TRACED


def test_a_step_of_which_nothing_is_known() -> None:
    """A record without breakdowns says so."""
    bare = traced_step(moments={}, allocator=None, device_memory=None, batch=None, step_seconds=None)
    assert render_text(bare).splitlines() == [
        "step 12 · rank 1 · cuda:1 · traced · memtrace took 0.4 ms",
        "nothing is known of what its memory was for",
    ]


def test_small_models_are_shown_in_mib() -> None:
    """Below 1 GiB the unit is MiB, and the table says so."""
    entries = {EntryKey(Category.WEIGHTS, "trainable", "float32"): 84 * MIB}
    record = traced_step(moments={Moment.PEAK: breakdown(Moment.PEAK, entries)})
    assert "sizes in MiB" in render_text(record)
    assert line_of(record, "■ weights").split() == ["■", "weights", "trainable", "float32", "84.00", "100.0%", "█" * 18]


def test_few_components_have_a_line_each() -> None:
    """Of 500 components the largest are named and the others added up."""
    entries = {
        EntryKey(Category.OPTIMIZER_STATE, f"state{number}", "float32"): (number + 1) * MIB for number in range(500)
    }
    moments = {Moment.PEAK: breakdown(Moment.PEAK, entries)}
    record = traced_step(moments=moments, allocator=None, device_memory=None)
    lines = [line for line in render_text(record).splitlines() if line.startswith("    ")][1:]
    named = MAX_COMPONENTS - 1
    assert [line.split()[0] for line in lines] == [*(f"state{499 - at}" for at in range(named)), f"{500 - named}"]
    rest = sum(range(1, 501 - named)) / 1024
    assert lines[-1].split()[1:3] == ["others", f"{rest:,.2f}"]


def test_the_sum_of_the_lines_is_the_total() -> None:
    """The sizes of the categories, as they are written, add up to the total."""
    record = traced_step(moments={Moment.PEAK: breakdown(Moment.PEAK, PEAK_ENTRIES)})
    written = [line for line in render_text(record).splitlines() if line.startswith("■")]
    sizes = [float(size) for line in written for size in re.findall(r" (\d+\.\d\d)(?= )", line)]
    assert sum(sizes) == pytest.approx(float(line_of(record, "total").split()[1]), abs=0.01)


def test_a_terminal_gets_the_colours_of_the_categories() -> None:
    """Patch, bar and the composition over the whole width use each category's one colour."""
    text = coloured(traced_step())
    for category in traced_step().moments[Moment.PEAK].by_category():
        assert ansi(COLOURS[category]) in text, category
    composition = text.splitlines()[2]
    assert len(re.sub(r"\x1b\[[\d;]*m", "", composition)) == 100
    assert composition.index(ansi(COLOURS[Category.WEIGHTS])) < composition.index(ansi(COLOURS[Category.ACTIVATIONS]))


def test_a_narrow_terminal_loses_bars_and_no_figure() -> None:
    """At 80 columns every size and share is there in full."""
    wide = re.findall(r"\d+\.\d+%?", render_text(traced_step(), 100))
    assert re.findall(r"\d+\.\d+%?", render_text(traced_step(), 80)) == wide
    assert all(len(line) <= 80 for line in render_text(traced_step(), 80).splitlines())


def test_names_cannot_command_the_terminal() -> None:
    """Control sequences and markup in a log that somebody else wrote are shown, not obeyed."""
    entries = {EntryKey(Category.WEIGHTS, "\x1b[2J[red]\n", dtype): GIB for dtype in ("\rx", "[bold]")}
    record = traced_step(device="cuda\x07", moments={Moment.PEAK: breakdown(Moment.PEAK, entries)})
    text = render_text(record)
    assert "    ?[2J[red]? ?x" in text
    assert "    ?[2J[red]? [bold]" in text
    assert "cuda?" in text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)


@given(steps, st.integers(30, 200))
def test_any_record_can_be_shown(record: StepRecord, width: int) -> None:
    """Every record that a log can hold makes a table of plain text that fits."""
    text = render_text(record, width)
    assert text.startswith("step ")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)


def test_a_slower_step_is_told() -> None:
    """Beside what memtrace has taken itself."""
    text = render_text(traced_step(self_seconds=0.02, slowed_seconds=0.04), width=200)
    assert "memtrace took 20 ms and slowed it by 40 ms" in text


def test_long_steps_are_told_in_seconds() -> None:
    """Durations have three digits and a unit that fits."""
    assert "· 12.3 s · memtrace took 1.5 ms" in render_text(traced_step(step_seconds=12.34, self_seconds=0.0015))


def test_no_bytes_is_no_division() -> None:
    """A breakdown of nothing is a step of which nothing is known."""
    record = traced_step()
    empty = {moment: replace(found, entries={}) for moment, found in record.moments.items()}
    assert "nothing is known" in render_text(replace(record, moments=empty))
