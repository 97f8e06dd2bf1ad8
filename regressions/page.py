"""Writes docs/regressions.md from the results of the releases and the notes on the jumps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from fnmatch import fnmatchcase
from textwrap import wrap

from memtrace.gate.case_file import read_case_file
from memtrace.record.units import format_bytes, format_gib
from regressions.notes import NOTES, Note
from regressions.results import CASES, HERE, Level, jumps, number, read

PAGE = HERE.parent / "docs" / "regressions.md"

MATTERS = 0.001
"""Share of the peak from which on a change is a jump."""

MODELS = ("llama", "qwen3", "gemma", "mistral", "gpt2", "bert", "t5", "vit", "whisper", "mixtral")
WIDTH = 120
"""Columns of the page's text."""

BISECTION = "memtrace bisect --package transformers --good 5.0.0 --bad 5.24.0 --case t5-autocast"
"""The command whose output is kept in bisected.txt."""

RECIPES = {
    "autocast": "hf-autocast: float32 weights under autocast, as Trainer with bf16=True; texts padded",
    "bf16": "pure-bf16: everything in bfloat16, with gradient checkpointing; texts not padded",
}
_SIZES = ("hidden_size", "d_model", "n_embd"), ("num_hidden_layers", "n_layer", "num_layers"), ("vocab_size",)

HEAD = """\
# Peaks over the releases of transformers

What a training step of ten models takes at its peak with releases of transformers from 4.50 to 5.24, and what changed
it. Made by `make regressions` of plans: no GPU was used, and the same release gives the same bytes on any machine. With
torch 2.13.0, kernels of CUDA and torch's fused AdamW throughout. [`memtrace bisect`](bisect.md) does the same for a
case of yours.

"""


def text() -> str:
    """Returns the page."""
    return HEAD + "\n".join(_lines()) + "\n"


def write() -> None:
    """Writes the page."""
    PAGE.write_text(text())


def notes_of(case: str, before: Level, after: Level) -> list[Note]:
    """Returns what is known of the change that a case had from one release to another."""
    first, last = number(before.releases[-1]), number(after.releases[0])
    return [
        note
        for note in NOTES
        if any(first < number(release) <= last and fnmatchcase(case, cases) for release, cases in note.jumps)
    ]


def large_jumps() -> Iterator[tuple[str, Level, Level]]:
    """Yields (case, before, after) for each change of a peak that matters, the largest share first."""
    found = [(case, *pair) for case in read_case_file(CASES).cases for pair in jumps(case)]
    found = [one for one in found if abs(_share(one[1], one[2])) >= MATTERS]
    yield from sorted(found, key=lambda one: (-abs(_share(one[1], one[2])), one[0]))


def _share(before: Level, after: Level) -> float:
    return (after.nbytes - before.nbytes) / before.nbytes


def _lines() -> Iterator[str]:
    yield from _cases()
    for recipe, words in RECIPES.items():
        yield from ("", f"## Peaks with {words.partition(':')[0]}", "", f"GiB;{words.partition(':')[2]}.")
        yield "Bold: another peak than in the row above, by 0.1 % or more."
        yield ""
        yield from _table(recipe)
    yield from ("", "## The jumps", "")
    yield from _jumps()
    yield from ("", "## What they are", "")
    for note in NOTES:
        yield from (f"### {note.title}", "", *wrap(note.text, WIDTH), "")
    yield from (
        "## Found by memtrace bisect",
        "",
        "In `regressions/` of the repository, 44 releases in seven trials:",
        "",
    )
    yield from ("```console", f"$ {BISECTION}", "```", "", "It said:", "")
    yield from ("```text", *(HERE / "bisected.txt").read_text().splitlines(), "```")


def _cases() -> Iterator[str]:
    cases = read_case_file(CASES).cases
    yield "| model | width | layers | words | batch |"
    yield "| --- | ---: | ---: | ---: | --- |"
    for model in MODELS:
        case = cases[f"{model}-autocast"]
        fields = json.loads((HERE / str(case.config)).read_text())
        sizes = [next((f"{fields[name]:,}" for name in names if name in fields), "") for names in _SIZES]
        kind = {"vit": "images", "whisper": "sounds of 30 s"}.get(model, f"texts of {case.seq_len} tokens")
        yield f"| {model} | {' | '.join(sizes)} | {case.batch_size} {kind} |"
    yield ""
    yield "Mistral and Mixtral are cut to 8 layers, and Mixtral to half its width, so that the peak shows activations."


def _table(recipe: str) -> Iterator[str]:
    yield "| transformers | " + " | ".join(MODELS) + " |"
    yield "| --- | " + " | ".join("---:" for _ in MODELS) + " |"
    found = {model: _by_release(f"{model}-{recipe}") for model in MODELS}
    releases = sorted({release for by_release in found.values() for release in by_release}, key=number)
    reasons: list[str] = []
    before: dict[str, Level] = {}
    for release in releases:
        cells = []
        for model in MODELS:
            level = found[model].get(release)
            if level is None or level.peak is None:
                cells.append("not run" if level is None else f"[{_footnote(reasons, level.reason)}]")
                continue
            size = format_gib(level.nbytes)
            changed = model in before and abs(_share(before[model], level)) >= MATTERS
            cells.append(f"**{size}**" if changed else size)
            before[model] = level
        yield f"| {release} | " + " | ".join(cells) + " |"
    yield ""
    yield from (f"[{index}] Cannot be planned: {_short(reason)}" for index, reason in enumerate(reasons, 1))


def _footnote(reasons: list[str], reason: str) -> int:
    if reason not in reasons:
        reasons.append(reason)
    return reasons.index(reason) + 1


def _short(reason: str) -> str:
    return f"{reason.partition(': choose')[0].partition(': did')[0].rstrip('.')}.\n"


def _by_release(case: str) -> dict[str, Level]:
    return {release: level for level in read(case).levels() for release in level.releases}


def _jumps() -> Iterator[str]:
    yield "Changes of 0.1 % or more between two neighbouring rows, the largest share first."
    yield ""
    yield "| by | after | case | peak before | change | | most of it, at the peak | what |"
    yield "| --- | --- | --- | ---: | ---: | ---: | --- | --- |"
    for case, before, after in large_jumps():
        release, nbytes = after.releases[0], after.nbytes - before.nbytes
        links = "; ".join(f"[{note.title}](#{note.anchor})" for note in notes_of(case, before, after))
        sizes = f"{format_bytes(before.nbytes)} | {_signed(nbytes)} | {_share(before, after):+.1%}"
        yield f"| {release} | {before.releases[-1]} | {case} | {sizes} | {_most(before, after)} | {links} |"


def _most(before: Level, after: Level) -> str:
    """Returns the entry and the module that changed most in the direction of the peak."""
    entries = [*(before.peak or {}), *(name for name in after.peak or {} if name not in (before.peak or {}))]
    up = 1 if after.nbytes > before.nbytes else -1
    entry = max(entries, key=lambda name: up * (after.entry(name) - before.entry(name)))
    was, now = (before.peak or {}).get(entry, {}), (after.peak or {}).get(entry, {})
    module = max({**was, **now}, key=lambda name: up * (now.get(name, 0) - was.get(name, 0)))
    return f"{entry} {_signed(after.entry(entry) - before.entry(entry))}, in `{module}`"


def _signed(nbytes: int) -> str:
    return f"+{format_bytes(nbytes)}" if nbytes > 0 else format_bytes(nbytes)
