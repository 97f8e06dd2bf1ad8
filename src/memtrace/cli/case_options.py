"""One case of the memory gate from the command line: its name in a file of cases, or its keys as options."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from memtrace.errors import ConfigError
from memtrace.gate.case_file import find_case_file, read_case_file
from memtrace.gate.cases import Case

GIVEN_HERE = "command-line"
"""Name of a case that no file has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenCase:
    """A case and where its paths begin."""

    case: Case
    root: Path
    python_path: tuple[Path, ...]


_TEXTS = {
    "config": ("PATH|NAME", "a config.json, a directory that has one, or a name on the hub"),
    "build": ("MODULE:FUNCTION", "in place of --config: a function that returns the model"),
    "batch": ("MODULE:FUNCTION", "a function that returns a micro batch for --build"),
    "loss": ("MODULE:FUNCTION", "a function of (model, batch) that returns the loss for --build"),
    "recipe": ("NAME", "as for memtrace plan; default bf16-master"),
    "optimizer": ("NAME", "default adamw"),
    "attn": ("NAME", "eager, sdpa or flash_attention_2; default: the model's own choice"),
    "dtype": ("NAME", "of the weights; default: the recipe's"),
    "lora_targets": ("NAMES", "modules that get adapters; default all-linear"),
    "device": ("NAME", "cuda, cpu, or a GPU such as H200; default cuda"),
}
_NUMBERS = {
    "batch_size": "samples of one micro batch; default 1",
    "seq_len": "tokens of a text; default 2048, or as many as the model has positions for",
    "image_size": "height and width of images; default: the model's",
    "accumulation_steps": "micro batches for each optimizer step; default 1",
    "lora_rank": "rank of the adapters; default 16 with LoRA",
}
_SWITCHES = {
    "padded": "texts of different lengths: attention gets a mask",
    "gradient_checkpointing": "recompute layers in the backward pass",
    "keep_outputs": "a loop that keeps the output of the model into the next step",
    "fused_optimizer": "torch's fused step, which has no temporaries",
}


def add_case_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the case."""
    group = parser.add_argument_group("case, from a file")
    group.add_argument("--case", metavar="NAME", help="a case of the file of cases; the only one where it has one")
    group.add_argument(
        "--file", type=Path, metavar="FILE", help="file of cases; default memtrace.toml, else pyproject.toml, here"
    )
    group = parser.add_argument_group("case, given here")
    for name, (metavar, meaning) in _TEXTS.items():
        group.add_argument(_option(name), metavar=metavar, help=meaning)
    for name, meaning in _NUMBERS.items():
        group.add_argument(_option(name), type=int, metavar="N", help=meaning)
    for name, meaning in _SWITCHES.items():
        group.add_argument(_option(name), action="store_true", default=None, help=meaning)


def case_of(arguments: argparse.Namespace) -> ChosenCase:
    """Returns the case that the options name.

    Raises:
        ConfigError: the file or the case cannot be used, or both a file's case and options of a case are given.
    """
    given = {name: getattr(arguments, name) for name in (*_TEXTS, *_NUMBERS, *_SWITCHES)}
    given = {name: value for name, value in given.items() if value is not None}
    if "config" in given or "build" in given:
        if arguments.case is not None or arguments.file is not None:
            raise ConfigError("--case and --file name a case of a file: leave them or --config and --build out")
        here = Path.cwd()
        return ChosenCase(case=Case(name=GIVEN_HERE, **given), root=here, python_path=(here,))
    if given:
        raise ConfigError(f"{_option(next(iter(given)))} is for a case given here: give --config or --build with it")
    file = read_case_file(arguments.file or find_case_file(Path.cwd()))
    name = arguments.case
    if name is None and len(file.cases) > 1:
        raise ConfigError(f"{file.path} has {len(file.cases)} cases: --case takes one of {', '.join(file.cases)}")
    if name is not None and name not in file.cases:
        raise ConfigError(f"{file.path} has no case {name!r}, only {', '.join(file.cases)}")
    case = file.cases[name or next(iter(file.cases))]
    return ChosenCase(case=case, root=file.root, python_path=file.python_path)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
