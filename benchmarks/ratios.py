"""From step times to ratios: pure functions over blocks of steps that ran in turns."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median, quantiles

RESAMPLES = 1000
"""Draws of the bootstrap behind an interval."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Some steps of one training run, one after the other."""

    seconds: Sequence[float]
    traced: Sequence[bool]
    """Which of the steps memtrace traced."""
    around_seconds: float = 0.0
    """What it took to start and stop the tool around the block."""

    @property
    def step_seconds(self) -> float:
        """Mean time of a step, with its share of what was around the block."""
        return (sum(self.seconds) + self.around_seconds) / len(self.seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """How much longer a variant takes than nothing; 1 is no difference."""

    ratio: float
    """Of a whole run: medians of steps that were not traced and of those that were, by the share of each."""
    interval: tuple[float, float]
    """Where `ratio` lies in 95 of 100 draws of the rounds (bootstrap)."""
    quartiles: tuple[float, float]
    """First and third quartile of the ratios of single blocks."""
    untraced: float | None
    """Median ratio of steps that memtrace did not trace; None where there was none."""
    traced: float | None
    """Median ratio of steps that memtrace traced; None where there was none."""
    total: float
    """All time of the variant over all time of nothing in the same rounds: what one outlier can move."""
    rounds: int
    steps: int
    traced_steps: int


@dataclass(frozen=True, slots=True)
class _Round:
    """The ratios of one round."""

    block: float
    untraced: float | None
    traced: Sequence[float]
    untraced_steps: int


def compare(blocks: Mapping[int, Block], reference: Mapping[int, Block]) -> Ratio:
    """Returns the ratio of a variant to nothing, each block held against that of the same round.

    Args:
        blocks: those of the variant, by the number of the round.
        reference: those of nothing, for at least the same rounds.
    """
    rounds = [_round(block, reference[number].step_seconds) for number, block in sorted(blocks.items())]
    draw = random.Random(0)
    drawn = sorted(_whole(draw.choices(rounds, k=len(rounds))) for _ in range(RESAMPLES))
    singles = [found.block for found in rounds]
    untraced = [found.untraced for found in rounds if found.untraced is not None]
    traced = [ratio for found in rounds for ratio in found.traced]
    first, _, third = quantiles(singles, n=4, method="inclusive") if len(singles) > 1 else singles * 3
    return Ratio(
        ratio=_whole(rounds),
        interval=(drawn[RESAMPLES // 40], drawn[-RESAMPLES // 40]),
        quartiles=(first, third),
        untraced=median(untraced) if untraced else None,
        traced=median(traced) if traced else None,
        total=mean(block.step_seconds for block in blocks.values())
        / mean(reference[number].step_seconds for number in blocks),
        rounds=len(rounds),
        steps=sum(len(block.seconds) for block in blocks.values()),
        traced_steps=len(traced),
    )


def _round(block: Block, nothing: float) -> _Round:
    """Returns the ratios of a block, given the mean step of nothing in the same round."""
    traced = [seconds / nothing for seconds, is_traced in zip(block.seconds, block.traced, strict=True) if is_traced]
    rest = len(block.seconds) - len(traced)
    others = sum(seconds for seconds, is_traced in zip(block.seconds, block.traced, strict=True) if not is_traced)
    return _Round(
        block=block.step_seconds / nothing,
        untraced=(others + block.around_seconds) / rest / nothing if rest else None,
        traced=traced,
        untraced_steps=rest,
    )


def _whole(rounds: Sequence[_Round]) -> float:
    """Returns the ratio of a run: the median of each kind of step, by how many there are of it."""
    untraced = [found.untraced for found in rounds if found.untraced is not None]
    traced = [ratio for found in rounds for ratio in found.traced]
    steps = sum(found.untraced_steps for found in rounds)
    whole = (median(untraced) * steps if untraced else 0.0) + (median(traced) * len(traced) if traced else 0.0)
    return whole / (steps + len(traced))
