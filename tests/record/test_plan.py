"""The plan as data: its verdict, and its form on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from memtrace.errors import LogFormatError, OutputError
from memtrace.planning.formula import plan_by_formula
from memtrace.planning.optimizers.states import find_optimizer
from memtrace.planning.recipe import find_recipe
from memtrace.planning.request import PlanRequest
from memtrace.record.categories import Moment
from memtrace.record.plan import ByteRange, Fit, Plan, Verdict, parse_plan, plan_document, read_plan

PLAN = plan_by_formula(
    PlanRequest(
        parameters=10**9,
        recipe=find_recipe("bf16-master"),
        optimizer=find_optimizer("adamw"),
        activation_ratio=0.3,
    )
)
FIT = Fit(device="H100-80GB", capacity_bytes=80, needed=ByteRange(low=60, high=90))


@pytest.mark.parametrize(
    ("low", "high", "verdict", "headroom"),
    [
        (60, 80, Verdict.FITS, (0, 20)),
        (60, 81, Verdict.UNCERTAIN, (-1, 20)),
        (80, None, Verdict.UNCERTAIN, (None, 0)),
        (81, 90, Verdict.DOES_NOT_FIT, (-10, -1)),
        (81, None, Verdict.DOES_NOT_FIT, (None, -1)),
    ],
)
def test_verdict(low: int, high: int | None, verdict: Verdict, headroom: tuple[int | None, int]) -> None:
    """It fits where even the most does, does not where not even the least does; else nobody can say."""
    fit = Fit(device="any", capacity_bytes=80, needed=ByteRange(low=low, high=high))
    assert (fit.verdict, fit.headroom) == (verdict, headroom)


def test_ranges_add_up() -> None:
    """Both ends add up; an open end stays open."""
    assert ByteRange(low=1, high=2) + ByteRange(low=10, high=20) == ByteRange(low=11, high=22)
    assert ByteRange(low=1, high=2) + ByteRange(low=10, high=None) == ByteRange(low=11, high=None)


def test_the_document_is_the_contract() -> None:
    """The fields that the public contract names are there, with their types."""
    document = json.loads(json.dumps(plan_document(PLAN)))
    assert document["schema"] == "memtrace.plan/1"
    assert document["recipe"] == "bf16-master"
    assert document["total_bytes"] == 16_600_000_000
    assert document["reserved_bytes"] is None and document["verdict"] is None
    assert document["assumptions"] == list(PLAN.assumptions)
    assert set(document["moments"]) == set(Moment)
    assert document["moments"]["peak"]["entries"][0] == {
        "category": "weights",
        "component": "trainable",
        "dtype": "bfloat16",
        "bytes": 2_000_000_000,
    }


@pytest.mark.parametrize("plan", [PLAN, replace(PLAN, fit=FIT, reserved_bytes=17 * 10**9, host_bytes=5)])
def test_a_plan_survives_being_written(plan: Plan, tmp_path: Path) -> None:
    """What is read is what was written."""
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan_document(plan)))
    assert read_plan(path) == plan


def test_the_verdict_is_written() -> None:
    """A plan against a device has its verdict, and both ends of the headroom."""
    document = plan_document(replace(PLAN, fit=FIT))
    assert document["verdict"] == "uncertain"
    assert document["device"]["headroom_bytes"] == {"low": -10, "high": 20}


def test_a_plan_of_the_contract_alone_can_be_read() -> None:
    """Only the fields that the contract names are needed, and fields that are not known do no harm."""
    needed = ("schema", "recipe", "assumptions", "total_bytes", "moments", "reserved_bytes", "verdict")
    document = {name: plan_document(PLAN)[name] for name in needed} | {"later": [1]}
    plan = parse_plan(document, "plan.json")
    assert plan.moments == PLAN.moments
    assert plan.allocated == ByteRange(low=PLAN.total_bytes, high=PLAN.total_bytes)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda document: document.update(schema="memtrace.step/1"), "schema must be 'memtrace.plan/1'"),
        (lambda document: document.pop("recipe"), "recipe must be a text, got nothing"),
        (lambda document: document["moments"].pop("peak"), "moments must have the peak"),
        (lambda document: document.update(total_bytes=1), "total_bytes must be the sum"),
        (lambda document: document["assumptions"].append(1), r"assumptions\[\d\] must be a text"),
        (lambda document: document.update(device={"name": "x"}), "device.capacity_bytes must be an integer"),
        (lambda document: document.update(allocated_bytes={"low": -1}), "allocated_bytes.low must be an integer"),
    ],
)
def test_a_spoilt_plan_is_named(spoil: Callable[[Any], None], said: str) -> None:
    """The message says the file, the field, and what was expected."""
    document = json.loads(json.dumps(plan_document(PLAN)))
    spoil(document)
    with pytest.raises(LogFormatError, match=f"^plan.json: .*{said}"):
        parse_plan(document, "plan.json")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    """No file, and no JSON, are two errors with the name of the file."""
    with pytest.raises(OutputError, match=r"plan\.json cannot be read"):
        read_plan(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(LogFormatError, match=r"plan\.json: must be one JSON value"):
        read_plan(tmp_path / "plan.json")
