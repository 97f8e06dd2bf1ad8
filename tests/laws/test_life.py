"""Law 8: what a run without memtrace would have let go is let go at the same moment with it."""

from __future__ import annotations

import gc
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from laws.families import Family
from laws.life import LIVES, Run, Story, play
from laws.surroundings import unchanged
from laws.ways import WAYS, Way, every_step
from torch import nn

from memtrace.config import TracerConfig
from memtrace.tracer import Tracer

QUIET: dict[str, Any] = {"strict": True, "port": None, "step_log": False, "device_poll_seconds": 0}
CONFIGS = {
    "traced": TracerConfig(**QUIET, trace_every=1),
    "counted": TracerConfig(**QUIET, trace_every=0),
    "default": TracerConfig(**QUIET),
}
TABLE = [(way, family) for way in WAYS for family in way.families]



@pytest.fixture(scope="module", autouse=True)
def loaded() -> None:
    """Loads what the first step of each model loads, and takes it out of garbage collection: 1 ms instead of 200."""
    for family in LIVES:
        play(every_step, Run(family, partial(Tracer, config=CONFIGS["traced"])))
    gc.collect()
    gc.freeze()


@cache
def bare_story(way: str, family: str) -> Story:
    """What happens without memtrace decides what is right."""
    played, model = next((w, f) for w, f in TABLE if (w.name, f.name) == (way, family))
    return play(played.play, Run(model))


@pytest.mark.parametrize("settings", CONFIGS)
@pytest.mark.parametrize(("way", "family"), [pytest.param(*row, id=f"{row[0]}-{row[1].name}") for row in TABLE])
def test_nothing_is_kept_hidden_or_changed(way: Way, family: Family, settings: str) -> None:
    """The same storages are made, and the same are alive at each moment, collected or not; the same is raised; weights
    and state are the same bits; hooks, threads, files and recorders are as before."""

    def watch(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tracer:
        return Tracer(model, optimizer, CONFIGS[settings])

    expected, run = bare_story(way.name, family.name), Run(family, watch)
    found = play(way.play, run, around=unchanged)
    assert found.raised == expected.raised
    assert kept_longer(found, expected) == []
    assert found.made == expected.made
    assert all(map(same_bits, found.values, expected.values))


def kept_longer(found: Story, expected: Story) -> list[str]:
    """Where the storages that are alive differ, and the first of those that only one run has."""
    moments = [f"{position}: {moment}" for position, (moment, _) in enumerate(expected.alive)]
    pairs = zip(moments, found.alive, expected.alive, strict=True)
    return [
        f"{moment}: {len(seen)} instead of {len(right)}, such as {sorted({*seen} ^ {*right})[:3]}"
        for moment, (_, seen), (_, right) in pairs
        if seen != right
    ]


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.equal(left.contiguous().view(-1).view(torch.uint8), right.contiguous().view(-1).view(torch.uint8))
