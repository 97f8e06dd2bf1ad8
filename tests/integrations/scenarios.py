"""Healthy runs that must raise no page and no ticket, and failures that must raise theirs and nothing else.

Sizes are those of a GPU of 85 GB, of which tensors may take 80; minutes and hours are in seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from histories import GB, INTERVAL, Scenario, Scrape, Story, ranks

MINUTE, HOUR = 60, 3600
NAN = float("nan")


def noise(at: int, *values: float) -> float:
    """Returns one of the values, without a pattern that any interval could share, and the same one each time."""
    return values[(at // INTERVAL * 2654435761 % 2**32) * len(values) // 2**32]


def one(**says: float | str | bool | None) -> Story:
    """Tells of one rank that says the same all the time."""
    return lambda at: [Scrape(at=at, **says)]  # type: ignore[arg-type]


def silent(name: str, tells: Story, minutes: int = 120, *, marked: bool = True) -> Scenario:
    """A healthy run."""
    return Scenario(name=name, tells=tells, minutes=minutes, marked=marked)


def raises(name: str, alerts: str, tells: Story, minutes: int = 120) -> Scenario:
    """A failure, and the alerts that tell it: `A B` means both."""
    return Scenario(
        name=name, tells=tells, raises=frozenset(f"Memtrace{alert}" for alert in alerts.split()), minutes=minutes
    )


def evaluating(at: int) -> Iterable[Scrape]:
    """Half an hour of training and half an hour of evaluation in turns."""
    phase = at % HOUR
    trained = min(phase, 30 * MINUTE)
    yield Scrape(at=at, steps=(at - phase) / 2 + trained, last_step=at - phase + trained)


def preempted(minutes: int) -> Story:
    """A run at 92 % that is stopped after half an hour, without a sign, and comes back under its name."""
    stopped, back = 30 * MINUTE, (30 + minutes) * MINUTE

    def tells(at: int) -> Iterable[Scrape]:
        started = 0 if at < stopped else back
        yield Scrape(at=at, peak=73.6 * GB, answers=not stopped <= at < back, started=started)

    return tells


def ending(state: str, *, after: int = 30 * MINUTE, lingers: int = INTERVAL, **says: float | str) -> Story:
    """A run that ends, by default after half an hour, says so for a while, and whose static target then stays."""
    end = after

    def tells(at: int) -> Iterable[Scrape]:
        answers = at < end + lingers
        last = min(at, end)
        yield Scrape(at=at, answers=answers, state="running" if at < end else state, last_step=last, **says)  # type: ignore[arg-type]

    return tells


def leaking(every: int, **says: float) -> Story:
    """4 GB an hour that only a trace names, one every so many minutes."""

    def tells(at: int) -> Iterable[Scrape]:
        traced = at // (every * MINUTE) * every * MINUTE
        grown = 4 * GB * at / HOUR
        found = 0.1 * GB + 4 * GB * traced / HOUR
        moved = {"allocated": 20 * GB + grown} | says
        yield Scrape(at=at, unattributed=found, peak=40 * GB + grown, last_traced=traced, **moved)

    return tells


def vanished(at: int, after: int, **says: float | int | str) -> Scrape:
    """A rank that answers no more from some minute on, whose target stays."""
    return Scrape(at=at, answers=at < after * MINUTE, **says)  # type: ignore[arg-type]


def eight(at: int, **of_rank_3: float | bool) -> Iterator[Scrape]:
    """Eight ranks, of which one may be unlike the others."""
    for scrape in ranks(Scrape(at=at), 8):
        yield Scrape(at=at, rank=3, instance="a:3", world=8, **of_rank_3) if scrape.rank == 3 else scrape  # type: ignore[arg-type]


def two_runs_of_one_name(at: int) -> Iterable[Scrape]:
    """Two users' jobs `train` of four ranks each, that need different memory."""
    yield from ranks(Scrape(at=at, run="train", run_id="1", peak=56 * GB), 4, host="a")
    yield from ranks(Scrape(at=at, run="train", run_id="2", peak=32 * GB), 4, host="b")


def staged(at: int) -> Iterable[Scrape]:
    """Layers unfrozen in stages: what becomes more has a name."""
    more = 1.2 * GB * (at // (12 * MINUTE))
    yield Scrape(at=at, weights=10 * GB + more, allocated=20 * GB + more, peak=40 * GB + more)


def rerun(at: int) -> Iterable[Scrape]:
    """Three runs of ten minutes on one port, each with a sign of its end, and a last one that is killed."""
    number, phase = divmod(at, 10 * MINUTE)
    state = "ok" if number < 3 and phase >= 9 * MINUTE else "running"
    yield Scrape(at=at, run_id=str(number), started=number * 600, state=state, answers=number < 4, steps=phase)


def captured(at: int) -> Iterable[Scrape]:
    """CUDA graphs of twelve lengths are captured within half an hour: private pools and memory outside torch grow."""
    graphs = min(at // (2.5 * MINUTE), 12)
    pools = graphs * 0.9 * GB
    yield Scrape(
        at=at,
        private_pool=pools,
        reserved=42 * GB + pools,
        non_torch=GB + graphs * 0.06 * GB,
        allocated=20 * GB + graphs * 1e7,
    )


def varying(at: int) -> Iterable[Scrape]:
    """Lengths that vary: peaks between 20 and 88 %, and a cache that torch grows and gives back."""
    peak = noise(at, 16, 25, 33, 48, 62, 70.4) * GB
    yield Scrape(at=at, peak=peak, reserved=noise(at + 7, 71, 74, 77) * GB, capacity=noise(at, 79, 80, 81) * GB)


def warming_up(at: int) -> Iterable[Scrape]:
    """Caches fill over the first half hour and stay."""
    filled = min(at, 30 * MINUTE) / (30 * MINUTE) * 3 * GB
    yield Scrape(
        at=at, unattributed=filled, allocated=20 * GB + filled, peak=40 * GB + filled, non_torch=GB + filled / 2
    )


def sawtooth(minutes: int) -> Story:
    """Something is gathered and given back in turns, such as metrics of an evaluation."""

    def tells(at: int) -> Iterable[Scrape]:
        gathered = at % (minutes * MINUTE) / (minutes * MINUTE) * 4 * GB
        yield Scrape(at=at, unattributed=gathered, allocated=20 * GB + gathered, peak=44 * GB)

    return tells


def in_turn(state: str, minutes: int) -> Story:
    """Launches of one name that live for some minutes each and end like this, on one port."""

    def tells(at: int) -> Iterable[Scrape]:
        number, phase = divmod(at, (minutes + 2) * MINUTE)
        ended = phase >= minutes * MINUTE
        says = state if ended else "running"
        answers = phase <= minutes * MINUTE + INTERVAL
        yield Scrape(
            at=at, run="sweep", run_id=str(number), started=at - phase, state=says, answers=answers, steps=phase
        )

    return tells


def with_text_file(state: str, *, rank: int = 0, world: int = 1, **says: float) -> Story:
    """A rank whose endpoint goes with its process after an hour; its text file, another target, says how it ended."""

    def tells(at: int) -> Iterable[Scrape]:
        known = Scrape(at=at, run=f"filed-{state}", run_id="9", rank=rank, world=world, **says)  # type: ignore[arg-type]
        yield replace(known, instance=f"a:{rank}", answers=at < HOUR)
        yield replace(known, instance="a:9100", text_file=True, state="running" if at < HOUR else state)

    return tells


def seven_of_eight(at: int) -> Iterable[Scrape]:
    """Seven ranks end without a last scrape, which their text files say; the eighth goes on."""
    yield Scrape(at=at, run="filed-ok", run_id="9", world=8)
    for rank in range(1, 8):
        yield from with_text_file("ok", rank=rank, world=8)(at)


def trying_algorithms(at: int) -> Iterable[Scrape]:
    """cuDNN tries its algorithms in the first steps and takes nearly all that is free; then the run is at 60 %."""
    first = at < 90
    yield Scrape(at=at, peak=(79.5 if first else 48) * GB, run_peak=79.5 * GB, reserved=79.8 * GB, retries=2)


def taken_over(at: int) -> Iterable[Scrape]:
    """One run ends well; another port changes its run while Prometheus is away, which leaves no mark of the old one."""
    if at < 30 * MINUTE + INTERVAL:
        yield Scrape(at=at, peak=73.6 * GB, state="ok" if at >= 30 * MINUTE else "running")
    else:
        yield Scrape(at=at, answers=False)
    if not 40 * MINUTE <= at < 41 * MINUTE:
        number = int(at >= 41 * MINUTE)
        yield Scrape(at=at, instance="b:0", run="next", run_id=str(number), started=number * 41 * MINUTE)


HEALTHY: tuple[Scenario, ...] = (
    silent("steady at half of the memory", one()),
    silent("steady at 92 %", one(peak=73.6 * GB)),
    silent("steady at 92 %, the mark a little above what is scraped", one(peak=70 * GB, run_peak=73.6 * GB)),
    silent("a mark of hours ago", one(run_peak=78 * GB)),
    silent("on a CPU", one(allocated=NAN, non_torch=0)),
    silent("a reference model that nobody named", one(unattributed=4.8 * GB)),
    silent("a third of the peak is nobody's", one(unattributed=13 * GB)),
    silent("buckets of DDP come and go", lambda at: [Scrape(at=at, comm=noise(at, 0, 2 * GB))]),
    silent("steps of a minute", lambda at: [Scrape(at=at, steps=at // 60, last_step=at // 60 * 60)]),
    silent("steps of forty minutes", lambda at: [Scrape(at=at, steps=at // 2400, last_step=at // 2400 * 2400)], 240),
    silent("an evaluation of half an hour each hour", evaluating, 240),
    silent("a checkpoint of ten minutes each half hour", lambda at: [
        Scrape(at=at, last_step=at - max(0, at % 1800 - 1200))
    ]),
    silent("preempted at 92 % and back after four minutes", preempted(4)),
    silent("one failed scrape at 92 %", lambda at: [Scrape(at=at, peak=73.6 * GB, answers=at != HOUR)]),
    silent("three failed scrapes in a row", lambda at: [Scrape(at=at, answers=not HOUR <= at < HOUR + 45)]),
    silent("a normal end at 92 % whose target stays", ending("ok", peak=73.6 * GB)),
    silent("normal ends that one scrape has seen, whenever the rules are evaluated", lambda at: (
        scrape for late in range(4) for scrape in ending("ok", after=30 * MINUTE + late * INTERVAL,
            instance=f"a:{late}", run_id=str(late), peak=73.6 * GB)(at)
    )),
    silent("a run that takes the port of one that has just ended", lambda at: [
        replace(scrape, run_id="2", started=at, state="running", answers=True, last_step=at)
        if at > 30 * MINUTE else scrape
        for scrape in ending("ok", run_id="1")(at)
    ]),
    silent("a normal end that is scraped for an hour", ending("ok", lingers=HOUR, peak=73.6 * GB)),
    silent("a normal end whose target goes", lambda at: [Scrape(at=at, peak=73.6 * GB)] if at < 30 * MINUTE else []),
    silent("stopped by a signal", ending("signal")),
    silent("two users' jobs of one name", two_runs_of_one_name),
    silent("a card of 24 GB where NCCL starts", lambda at: [
        Scrape(at=at, total=25.3 * GB, capacity=23 * GB, peak=12 * GB, non_torch=(0.3 if at < 60 else 1.6) * GB)
    ]),
    silent("a process group is made late", lambda at: [Scrape(at=at, non_torch=(1 if at < HOUR else 4) * GB)], 240),
    silent("what is outside torch is read too high now and then", lambda at: [
        Scrape(at=at, non_torch=noise(at, 1, 1, 1, 5) * GB)
    ], 240),
    silent("a wide band at first", lambda at: [Scrape(at=at, risk=1 if at < 30 else 0)], 60),
    silent("a forecast a little beyond the capacity", one(risk=0.7)),
    silent("a risk that jumps between 0 and 1", lambda at: [Scrape(at=at, risk=noise(at, 0, 1))]),
    silent("layers unfrozen in stages", staged),
    silent("lengths that vary", varying, 240),
    silent("CUDA graphs are captured", captured, 240),
    silent("caches fill for half an hour", warming_up, 240),
    silent("gathered and given back each quarter of an hour", sawtooth(15), 240),
    silent("gathered and given back each hour", sawtooth(60), 240),
    silent("a leak that is seen in one scrape", lambda at: [Scrape(at=at, time_to_limit=600 if at == HOUR else None)]),
    silent("a cache is given back once", lambda at: [Scrape(at=at, retries=at // HOUR)], 240),
    silent("caches were given back before the first scrape", one(retries=20)),
    silent("the model takes twenty minutes to load", lambda at: [
        Scrape(at=at, steps=0, last_step=NAN) if at < 1200 else Scrape(at=at)
    ]),
    silent("eight ranks, the last one up after four minutes",
        lambda at: ranks(Scrape(at=at), 8 if at >= 240 else 7, world=8)),
    silent("seven of eight ranks have ended well", lambda at: (
        Scrape(
            at=at, rank=r, instance=f"a:{r}", world=8, run_id="1",
            state="ok" if r and at > HOUR else "running", answers=not r or at < HOUR + 90,
        )
        for r in range(8)
    ), 100),
    silent("a text file of a run that has ended well", lambda at: [
        Scrape(at=at, text_file=True, state="ok" if at > HOUR else "running")
    ]),
    silent("a normal end at 92 % that only the text file tells", with_text_file("ok", peak=73.6 * GB)),
    silent("seven of eight ranks have ended well, as their text files say", seven_of_eight),
    silent("two ranks, and six more ports on which nobody listens", lambda at: [
        *ranks(Scrape(at=at), 2), *(Scrape(at=at, instance=f"a:{r}", answers=False) for r in range(2, 8))
    ]),
    silent("algorithms are tried in the first steps", trying_algorithms),
    silent("a sweep of short runs of one name", in_turn("ok", 8)),
    silent("preempted each ten minutes", in_turn("signal", 8)),
    silent("a port changes its run while Prometheus is away", taken_over, marked=False),
    silent("a bad quarter of an hour for the capacity", lambda at: [
        Scrape(at=at, peak=60 * GB, capacity=noise(at, 80, 80, 80, 61) * GB)
    ]),
)  # fmt: skip

FAILING: tuple[Scenario, ...] = (
    *(raises(f"a leak that is traced every {n} minutes", "MemoryLeak", leaking(n), 240) for n in (1, 5, 20)),
    *(
        raises(f"a leak on a CPU, traced every {n} minutes", "MemoryLeak", leaking(n, allocated=NAN), 240)
        for n in (5, 20)
    ),
    raises("a leak beside buckets that come and go", "MemoryLeak", lambda at: [
        Scrape(at=at, comm=noise(at, 0, 2 * GB), allocated=20 * GB + noise(at, 0, 2 * GB) + 4 * GB * at / HOUR)
    ], 240),
    raises("one of eight ranks at 97 %", "HeadroomLow", lambda at: eight(at, peak=77.6 * GB)),
    raises("one step in four at 99.5 %", "HeadroomLow", lambda at: [
        Scrape(at=at, peak=80 * GB * noise(at, 0.5, 0.7, 0.9, 0.995), reserved=79.8 * GB)
    ], 240),
    raises("the mark rises between scrapes", "HeadroomLow", lambda at: [
        Scrape(at=at, run_peak=40 * GB + at // MINUTE * 0.33 * GB)
    ]),
    raises("another process takes the device", "HeadroomLow", lambda at: [
        Scrape(at=at, capacity=(80 if at < HOUR else 41) * GB)
    ]),
    raises("the largest batch will not fit", "OomPredicted", one(risk=0.97)),
    raises("the largest batch will not fit, and one scrape in ten says otherwise", "OomPredicted", lambda at: [
        Scrape(at=at, risk=0.0 if at % 150 == 0 else 1.0)
    ]),
    raises("a leak with fifty minutes left", "LimitSoon", one(time_to_limit=50 * MINUTE)),
    raises("the time to the limit comes and goes", "LimitSoon", lambda at: [
        Scrape(at=at, time_to_limit=50 * MINUTE if at % MINUTE else None)
    ]),
    raises("out of memory before the first scrape, and on", "OutOfMemorySurvived", one(ooms=1), 60),
    raises("out of memory after an hour, and on", "OutOfMemorySurvived", lambda at: [
        Scrape(at=at, ooms=int(at > HOUR))
    ]),
    raises("ended out of memory", "OutOfMemory", ending("out_of_memory", peak=76 * GB), 100),
    raises("ended out of memory, which one scrape has seen between two evaluations", "OutOfMemory",
        ending("out_of_memory", after=30 * MINUTE + INTERVAL, peak=76 * GB), 100),
    raises("ended out of memory, as a text file says", "OutOfMemory", lambda at: [
        Scrape(at=at, text_file=True, state="out_of_memory" if at > HOUR else "running", ooms=int(at > HOUR))
    ]),
    raises("two text files of one name, of which one ends out of memory", "OutOfMemory", lambda at: [
        Scrape(at=at, text_file=True, run_id="1", state="out_of_memory" if at > HOUR else "running"),
        Scrape(at=at, text_file=True, run_id="2", state="ok" if at > HOUR else "running"),
    ]),
    raises("ended out of memory near the limit, which only the text file tells", "OutOfMemory",
        with_text_file("out_of_memory", peak=76 * GB), 100),
    raises("killed, as far as its text file knows", "TrainerVanishedNearLimit",
        with_text_file("running", peak=76 * GB), 100),
    raises("ended with another exception", "RunFailed", ending("exception")),
    raises("a hang before the first step", "NoFirstStep", one(steps=0, last_step=NAN)),
    raises("a hang in a step", "Stalled", lambda at: [
        Scrape(at=at, steps=min(at, HOUR), last_step=min(at, HOUR))
    ], 240),
    raises("a hang of a run that evaluates for half an hour", "Stalled",
        lambda at: evaluating(at) if at < 3 * HOUR else [Scrape(at=at, steps=5400, last_step=9000)], 300),
    raises("one of eight ranks hangs, and the others go on", "Stalled", lambda at: eight(
        at, steps=min(at, HOUR), last_step=min(at, HOUR)
    ), 240),
    raises("killed at half of its memory", "TrainerGone", lambda at: [vanished(at, 30)]),
    raises("killed at 92 %", "TrainerVanishedNearLimit", lambda at: [vanished(at, 30, peak=73.6 * GB)]),
    raises("killed before its first step", "TrainerGone", lambda at: [vanished(at, 10, steps=0, last_step=NAN)]),
    raises("preempted and not back for ten minutes", "TrainerGone",
        lambda at: preempted(10)(at) if at >= 1800 else [Scrape(at=at)]),
    raises("the fourth run of a port is killed", "TrainerGone", rerun),
    raises("one of eight ranks is killed", "TrainerGone RankMissing", lambda at: eight(at, answers=at < HOUR)),
    raises("one of eight ranks is gone with its target", "RankMissing",
        lambda at: (s for s in ranks(Scrape(at=at), 8) if s.rank != 5 or at < HOUR)),
    raises("two of eight ranks from the start", "RankMissing", lambda at: ranks(Scrape(at=at), 2, world=8), 60),
    raises("one rank of the second of two jobs of one name", "RankMissing", lambda at: (
        s for s in two_runs_of_one_name(at) if s.instance != "b:2" or at < HOUR
    )),
    raises("a library beside torch takes 4 GB an hour", "NonTorchGrowth", lambda at: [
        Scrape(at=at, non_torch=GB + 4 * GB * at / HOUR)
    ], 240),
    raises("the cache is given back each minute", "AllocatorRetries", lambda at: [
        Scrape(at=at, retries=at // MINUTE)
    ], 60),
    raises("a third of the reserve is of no use", "FragmentationHigh",
        one(peak=50 * GB, reserved=76 * GB, capacity=56 * GB)),
)  # fmt: skip

SCENARIOS = (*HEALTHY, *FAILING)
