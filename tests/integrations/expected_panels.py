"""What each panel of a run must show, by what the run itself has said."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

from logged_runs import SELF_SHARE, SLOWED_SHARE, STEPS_A_SCRAPE, Log, Run
from remote_write import INTERVAL

from memtrace.record.breakdown import AllocatorReading, DeviceReading
from memtrace.record.categories import Moment
from memtrace.record.risk_reading import PeakForecast, RiskReading
from memtrace.record.snapshot import Snapshot

SCRAPED_BEFORE = 4
"""Seconds from a scrape to the next point in time at which a dashboard asks."""
Shown = dict[str, float]
"""Values by legend."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """What a run has said, by the points in time at which a dashboard asks."""

    run: Run
    log: Log
    begin: float

    @property
    def points(self) -> list[float]:
        """Those between its first scrape and its last."""
        return [self.begin + SCRAPED_BEFORE + INTERVAL * number for number in self.run.scrapes]

    def ranks(self, at: float) -> dict[int, Snapshot]:
        """What each rank has said last, at one of the points."""
        return {rank: snapshots[at - SCRAPED_BEFORE] for rank, snapshots in self.log.items()}

    def each(self, figure: Callable[[Snapshot], float], at: float) -> list[float]:
        """A figure of each rank."""
        return [figure(snapshot) for snapshot in self.ranks(at).values()]

    def lately(self, figure: Callable[[Snapshot], float], at: float) -> list[list[float]]:
        """A figure of each rank, at this point and at the one before: the interval of a graph has both."""
        points = [point for point in (at - INTERVAL, at) if point in self.points]
        return [list(told) for told in zip(*(self.each(figure, point) for point in points), strict=True)]

    def fullest(self, at: float) -> Snapshot:
        """What that rank says that has had the highest peak of all."""
        rank = max(self.log, key=lambda rank: max(peak(said) for said in self.log[rank].values()))
        return self.ranks(at)[rank]


def peak(said: Snapshot) -> int:
    assert said.latest is not None
    return said.latest.moments[Moment.PEAK].total_bytes


def tokens(said: Snapshot) -> int:
    assert said.latest is not None
    assert said.latest.batch is not None
    return said.latest.batch.tokens


def last_step(said: Snapshot) -> float:
    assert said.latest is not None
    return said.latest.unix_seconds


def risks(said: Snapshot) -> RiskReading:
    assert said.risk is not None
    return said.risk


def risk(said: Snapshot) -> float:
    return risks(said).oom_risk_ratio or 0


def capacity(said: Snapshot) -> int:
    return risks(said).capacity_bytes or 0


def forecast(said: Snapshot) -> PeakForecast:
    found = risks(said).peak
    assert found is not None
    return found


def time_to_limit(said: Snapshot) -> float:
    growth = risks(said).growth
    assert growth is not None
    return growth.seconds_to_limit or 0


def allocator(said: Snapshot) -> AllocatorReading:
    assert said.latest is not None
    assert said.latest.allocator is not None
    return said.latest.allocator


def pools(said: Snapshot) -> int:
    return allocator(said).private_pool_bytes or 0


def device(said: Snapshot) -> DeviceReading:
    assert said.device is not None
    return said.device


def categories(said: Snapshot, moment: Moment) -> Shown:
    assert said.latest is not None
    return {category.value: size for category, size in said.latest.moments[moment].by_category().items()}


def by_rank(figure: Callable[[Snapshot], float | None]) -> Callable[[Life, float], Shown]:
    return lambda life, at: {f"rank {rank}": figure(said) or 0 for rank, said in life.ranks(at).items()}


def plan_and_peak(life: Life, at: float) -> Shown:
    said = life.fullest(at)
    measured, planned = (
        categories(said, Moment.PEAK),
        {c.value: n for c, n in said.plan[Moment.PEAK].by_category().items()},
    )
    for sizes in (measured, planned):
        sizes["total"] = sum(sizes.values())
    difference = {name: measured.get(name, 0) - planned.get(name, 0) for name in {*measured, *planned}}
    columns = {"planned": planned, "measured": measured, "difference": difference}
    return {f"{column} {name}": size for column, sizes in columns.items() for name, size in sizes.items()}


def parts_of_the_device(life: Life, at: float) -> Shown:
    said = life.fullest(at)
    read, told = device(said), allocator(said)
    return {
        "tensors": told.allocated_bytes,
        "allocator slack": told.slack_bytes,
        "private pools": pools(said),
        "outside torch": read.non_torch_bytes or 0,
        "other processes": read.other_processes_bytes or 0,
        "free": read.free_bytes or 0,
    }


def unused(life: Life, at: float) -> Shown:
    held = life.each(lambda said: allocator(said).reserved_bytes - pools(said), at)
    return {"unused": max(1 - max(peaks) / size for peaks, size in zip(life.lately(peak, at), held, strict=True))}


def behind(life: Life, at: float) -> Shown:
    ended = {rank: last_step(said) for rank, said in life.ranks(at).items()}
    return {f"rank {rank}": max(ended.values()) - when for rank, when in ended.items()}


def forecasts(life: Life, at: float) -> Shown:
    def expected(share: int) -> float:
        return max(life.each(lambda said: forecast(said).predicted_bytes + share * forecast(said).band_bytes, at))

    return {
        "peak of a step": max(map(max, life.lately(peak, at))),
        "expected": expected(0),
        "expected, upper": expected(1),
        "expected, lower": expected(-1),
        "capacity": min(life.each(capacity, at)),
    }


def share(said: Snapshot) -> float:
    return peak(said) / capacity(said)


PANELS: Mapping[str, Callable[[Life, float], Shown]] = {
    "Out-of-memory risk": lambda life, at: {"risk": max(life.each(risk, at))},
    "Headroom at the peak": lambda life, at: {"headroom": 1 - max(life.each(share, at))},
    "Peak of a step": lambda life, at: {"peak": max(map(max, life.lately(peak, at)))},
    "Forecast for the largest batch": lambda life, at: {
        "forecast": max(life.each(lambda said: forecast(said).predicted_bytes / capacity(said), at))
    },
    "Time until a leak fills the memory": lambda life, at: {"time to out-of-memory": min(life.each(time_to_limit, at))},
    "Ranks seen of expected": lambda life, at: {"seen": len(life.ranks(at)), "expected": life.run.ranks + 1},
    "Time since the last step": lambda life, at: {"since the last step": at - min(life.each(last_step, at))},
    "Steps an hour": lambda life, at: {"steps": STEPS_A_SCRAPE * int(life.run.run_id) * 3600 / INTERVAL},
    "Composition of the peak": lambda life, at: (
        categories(life.fullest(at), Moment.PEAK) | {"capacity": capacity(life.fullest(at))}
    ),
    "Plan against measured": plan_and_peak,
    "Headroom at the peak, and risk": lambda life, at: {
        "headroom": 1 - max(map(max, life.lately(share, at))),
        "risk": max(life.each(risk, at)),
    },
    "Forecast against capacity": forecasts,
    "Peak against tokens": lambda life, at: {
        "tokens of the largest micro batch": tokens(life.fullest(at)),
        "peak of a step": peak(life.fullest(at)),
    },
    "Persistent memory": lambda life, at: categories(life.fullest(at), Moment.STEP_END),
    "Memory of the device": parts_of_the_device,
    "Fragmentation: reserved, but unused": unused,
    "Memory of each process": lambda life, at: (
        by_rank(lambda said: device(said).process_bytes)(life, at)
        | {"total": max(life.each(lambda said: device(said).total_bytes or 0, at))}
    ),
    "Power": by_rank(lambda said: device(said).power_watts),
    "Temperature": by_rank(lambda said: device(said).temperature_celsius),
    "Utilisation": by_rank(lambda said: device(said).utilization_ratio),
    "What memtrace costs": lambda life, at: {"share of time": (SELF_SHARE + SLOWED_SHARE) * int(life.run.run_id)},
    "Age of the last exact breakdown": lambda life, at: {"age": at - min(life.each(last_step, at))},
    "Peak over the ranks": lambda life, at: {
        "highest": max(map(max, life.lately(peak, at))),
        "median": median(life.each(peak, at)),
        "lowest": min(life.each(peak, at)),
        "capacity": min(life.each(capacity, at)),
    },
    "Ranks that lag behind": behind,
    "Fullest ranks": lambda life, at: {str(rank): share(said) for rank, said in life.ranks(at).items()},
    "Highest risks": lambda life, at: {str(rank): risk(said) for rank, said in life.ranks(at).items()},
    "Composition of each rank's peak": lambda life, at: {
        f"{category} {rank}": size
        for rank, said in life.ranks(at).items()
        for category, size in categories(said, Moment.PEAK).items()
    },
}
"""What each panel of a run must show of its log, by its title."""
COLUMNS = ("state", "risk", "headroom", "since the last step", "seen", "expected", "firing")
"""Those of the table of all runs, in the order of its queries."""
STATES = ("ok", "running", "signal", "exception", "out_of_memory", "gone")
RATES = {"Steps an hour", "What memtrace costs"}
"""Panels of rates, which begin with the second scrape and are whole after a minute."""
OVER_AN_INTERVAL = {
    "Peak of a step",
    "Headroom at the peak, and risk",
    "Forecast against capacity",
    "Fragmentation: reserved, but unused",
    "Peak over the ranks",
}
"""Panels of what is highest within an interval, which still has a value one point after the end."""
