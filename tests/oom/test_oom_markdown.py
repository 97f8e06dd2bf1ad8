"""The report for people."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cuda_scenes import CASES, GIB, MIB, Case, report_of
from test_oom_document import FULL

from memtrace.oom.markdown import headline, render_markdown
from memtrace.record.categories import Phase
from memtrace.record.oom.report import FailedRequest, Holder, OomReport, Witness


def tables(text: str) -> list[list[str]]:
    """Returns the tables as lists of lines."""
    found: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            found[-1].append(line)
        elif found[-1]:
            found.append([])
    return [table for table in found if table]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_first_sentence_says_where_and_what(case: Case) -> None:
    """The first lines name the step, the phase and the largest category."""
    head = "\n".join(render_markdown(report_of(case)).splitlines()[:4])
    assert "at step 7" in head
    assert case.top in head


@pytest.mark.parametrize("report", [FULL, *map(report_of, CASES)], ids=lambda report: report.request.phase)
def test_tables_have_as_many_cells_as_heads(report: OomReport) -> None:
    """Every row of every table is whole."""
    for table in tables(render_markdown(report)):
        assert len({line.replace("\\|", "").count("|") for line in table}) == 1, table


def test_hostile_names_stay_in_their_cells() -> None:
    """Pipes, backticks and line feeds in names and messages break no table."""
    hostile = "a|b`c\nd"
    report = replace(
        FULL,
        run_name=hostile,
        request=replace(FULL.request, module=hostile, message=hostile),
        holders=(Holder(name=hostile, modules=1, categories={}),),
    )
    test_tables_have_as_many_cells_as_heads(report)


def test_what_is_not_whole_is_said_so() -> None:
    """A reader is told of estimates, of what could not be seen, and of what was gone."""
    text = render_markdown(
        replace(
            FULL,
            composition=replace(FULL.composition, complete=False, estimated=True),
            request=FailedRequest(witness=Witness.RESTART, phase=Phase.BACKWARD),
        )
    )
    assert "Only what lives longer than a step could be seen" in text
    assert "told from other blocks by counters" in text
    assert "gone by then" in text
    assert "| asked for | not known |" in text


def test_sizes_are_exact_beside_the_rounded_ones() -> None:
    """What was asked for is there to the byte."""
    request = replace(FULL.request, requested_bytes=2 * GIB + 1)
    assert f"2.00 GiB ({2 * GIB + 1} B)" in render_markdown(replace(FULL, request=request))


def test_private_pools_have_a_line_of_their_own() -> None:
    """What CUDA graphs hold is no slack; a report without any says nothing of them."""
    assert FULL.allocator is not None
    allocator = replace(FULL.allocator, private_pool_bytes=3 * GIB)
    text = render_markdown(replace(FULL, allocator=allocator))
    assert f"| private pools (CUDA graphs), which nobody else can use | 3.00 GiB ({3 * GIB} B) |" in text
    assert "private pools" not in render_markdown(replace(FULL, allocator=replace(allocator, private_pool_bytes=0)))


def test_segment_is_no_request() -> None:
    """What the allocator wanted of the device is told as that, beside the request or in its place."""
    both = replace(FULL.request, requested_bytes=3 * MIB, segment_bytes=20 * MIB)
    segment = replace(FULL.request, requested_bytes=None, segment_bytes=20 * MIB)
    assert (
        f"| asked for | 3.00 MiB ({3 * MIB} B), for which the allocator wanted a segment of 20.00 MiB ({20 * MIB} B) |"
        in render_markdown(replace(FULL, request=both))
    )
    assert f"| asked for | at most a segment of 20.00 MiB ({20 * MIB} B) |" in render_markdown(
        replace(FULL, request=segment)
    )


def test_failure_without_an_exception_is_not_called_the_end() -> None:
    """A report that no exception has followed says so."""
    text = render_markdown(replace(FULL, request=replace(FULL.request, pending=True)))
    assert text.splitlines()[2].startswith("A failed allocation at step 7")
    assert "No exception had followed" in text


def test_headline_of_nothing_known() -> None:
    """Without a composition the sentence only says where."""
    empty = replace(FULL, step=None, composition=replace(FULL.composition, entries={}))
    assert headline(empty) == "out of memory, in the forward pass"
