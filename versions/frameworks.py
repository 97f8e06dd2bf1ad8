"""Fine-tunes a tiny model with the frameworks of examples/frameworks, by their own commands: `make frameworks`.

Each in an environment of its own, once with memtrace and once without. What came of it is committed, and is the table
of docs/frameworks.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from versions.environments import ROOT, VARIABLES, environment, installed, version_of

RESULTS = Path(__file__).parent / "frameworks.json"
PAGE = ROOT / "docs" / "frameworks.md"
BEGIN, END = "<!-- table: frameworks -->", "<!-- end -->"
EXAMPLES = Path("examples") / "frameworks"
OUTPUT = Path("memtrace-runs") / "frameworks"
OUR_KEYS = ("plugins", "memtrace", "external_plugins", "callbacks", "ENV")
"""What the configurations have for memtrace alone: the run without it is begun without them."""
NO_DEVICE = {"CUDA_VISIBLE_DEVICES": "", "AXOLOTL_DO_NOT_TRACK": "1", "MEMTRACE_PORT": "0", "MEMTRACE_TRACE_EVERY": "2"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Framework:
    """One framework, and what of it runs on a CPU."""

    name: str
    package: str
    version: str
    configuration: str
    command: tuple[str, ...]
    """The command, which the configuration follows."""
    has_plugin: bool
    """Whether the configuration has a plugin of memtrace. `memtrace run` stands before the command in any case, then
    with a configuration that has nothing of memtrace."""
    wanted: tuple[str, ...]
    """What it is installed with: the versions that it asks for, and of what it imports what this run needs. All that it
    asks for would be servers, clouds and kernels of a GPU."""


ALWAYS = ("prometheus-client", "nvidia-ml-py", "rich", "scipy", "einops", "pyyaml")
FRAMEWORKS = (
    Framework(
        name="axolotl",
        package="axolotl",
        version="0.19.0",
        configuration="axolotl.yml",
        command=("axolotl", "train"),
        has_plugin=True,
        wanted=(
            *("torch==2.11.0", "transformers==5.16.1", "accelerate==1.13.0", "peft==0.20.0", "trl==1.9.0"),
            *("datasets==4.8.4", "huggingface_hub==1.17.0", "tokenizers==0.23.1", "python-dotenv==1.0.1", "fire"),
            *("addict", "posthog", "pillow", "numba", "fastcore", "colorama", "psutil", "wandb", "evaluate"),
            *("axolotl-contribs-lgpl==0.0.7", "axolotl-contribs-mit==0.0.6"),
        ),
    ),
    Framework(
        name="ms-swift",
        package="ms-swift",
        version="4.6.0",
        configuration="ms_swift.yaml",
        command=("swift", "sft"),
        has_plugin=True,
        wanted=(
            *("torch==2.8.0", "transformers==4.57.6", "accelerate==1.11.0", "peft==0.17.1", "trl==0.24.0"),
            *("datasets==4.8.4", "modelscope", "json-repair", "pillow", "cryptography", "pydantic"),
        ),
    ),
    Framework(
        name="LLaMA-Factory",
        package="llamafactory",
        version="0.9.5",
        configuration="llamafactory.yaml",
        command=("llamafactory-cli", "train"),
        has_plugin=False,
        wanted=(
            *("torch==2.8.0", "torchaudio==2.8.0", "torchvision==0.23.0", "transformers==4.57.6", "accelerate==1.11.0"),
            *("peft==0.18.1", "trl==0.24.0", "datasets==4.0.0", "av==15.1.0", "omegaconf", "pillow"),
        ),
    ),
    Framework(
        name="TRL",
        package="trl",
        version="1.16.0",
        configuration="trl.yaml",
        command=("trl", "sft", "--config"),
        has_plugin=False,
        wanted=("torch==2.13.0", "transformers==5.23.0", "accelerate==1.15.0", "peft==0.21.2", "datasets==5.2.0"),
    ),
)


class Wrong(Exception):
    """A run did not do what it must; the message says which and what."""


def measured(framework: Framework, python: Path) -> dict[str, Any]:
    """Returns what came of a framework's run with memtrace, in each way to have it, beside one without.

    Raises:
        Wrong: a run failed, there is no record, one does not close, memtrace has changed what was trained, or
            `memtrace run` traces something else than the plugin.
    """
    with TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "examples").symlink_to(ROOT / "examples")
        _run(python, [str(python), EXAMPLES / "tiny_model.py", OUTPUT], directory)
        configuration = ROOT / EXAMPLES / framework.configuration
        settings = yaml.safe_load(configuration.read_text())
        plain = directory / f"plain{configuration.suffix}"
        plain.write_text(
            yaml.safe_dump({key: settings[key] for key in settings if key not in OUR_KEYS}, sort_keys=False)
        )
        output = directory / settings["output_dir"]
        run = [str(python), "-m", "memtrace", "run", *framework.command, plain.name]
        ways = [run, *([[*framework.command, EXAMPLES / framework.configuration]] if framework.has_plugin else [])]
        found, trained = [], []
        for way in ways:
            _run(python, way, directory)
            found.append(checked(output / "memtrace" / "steps-rank0.jsonl", settings["max_steps"]))
            trained.append(_weights(output))
            shutil.rmtree(output)
        _run(python, [*framework.command, plain.name], directory)
        if (output / "memtrace").exists():
            raise Wrong(f"{framework.name}: a run without memtrace has left records")
        for weights in trained:
            if not weights or weights != _weights(output):
                raise Wrong(f"{framework.name}: other weights than without memtrace: {weights} and {_weights(output)}")
        if found[0]["categories"].keys() != found[-1]["categories"].keys():
            raise Wrong(f"{framework.name}: memtrace run and the plugin see different things: {found}")
        return {**found[-1], "ways": len(ways)}  # the plugin's, where there is one


def checked(log: Path, steps: int) -> dict[str, Any]:
    """Returns how many steps a log has, how many of them were traced, and the largest peak with its categories.

    Raises:
        Wrong: a step is missing, none was traced, or the categories of one do not add up to what was allocated.
    """
    records = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    if [record["step"] for record in records] != [*range(1, steps + 1)]:
        raise Wrong(f"{log}: expected steps 1 to {steps}, found {[record['step'] for record in records]}")
    traced = [record for record in records if record["traced"]]
    for record in traced:
        for name, moment in record["moments"].items():
            total = sum(entry["bytes"] for entry in moment["entries"])
            if total != moment["allocated_bytes"] or not total:
                raise Wrong(f"{log}: step {record['step']}, {name}: {total} of {moment['allocated_bytes']} bytes")
    if not traced:
        raise Wrong(f"{log}: no step was traced")
    peak = max((record["moments"]["peak"] for record in traced), key=lambda moment: int(moment["allocated_bytes"]))
    categories = Counter[str]()
    for entry in peak["entries"]:
        categories[entry["category"]] += entry["bytes"]
    return {
        "steps": steps,
        "traced": len(traced),
        "peak_bytes": peak["allocated_bytes"],
        "categories": dict(sorted(categories.items())),
    }


def _run(python: Path, command: list[Any], directory: Path) -> None:
    path = f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}"
    variables = {**os.environ, **VARIABLES, **NO_DEVICE, "PATH": path}
    words = list(map(str, command))
    done = subprocess.run(words, cwd=directory, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Wrong(f"{' '.join(words)} ended with {done.returncode}:\n{done.stderr[-4000:]}")


def _weights(output: Path) -> dict[str, str]:
    """Returns a checksum of each file of weights."""
    return {
        str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for path in sorted(output.rglob("*.safetensors"))
    }


def results() -> dict[str, dict[str, Any]]:
    """Returns what the runs have noted, by name."""
    found: dict[str, dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return found


def table() -> str:
    """Returns the table of the page."""
    return "\n".join(_rows())


def _rows() -> Iterator[str]:
    yield "| framework | with | configuration | by | steps, traced | peak | of it |"
    yield "| --- | --- | --- | --- | ---: | ---: | --- |"
    known = results()
    for one in FRAMEWORKS:
        if one.name in known:
            found = known[one.name]
            largest = Counter(found["categories"]).most_common(3)
            shares = ", ".join(f"{name} {size / found['peak_bytes']:.0%}" for name, size in largest)
            with_ = ", ".join(f"{name} {found[name]}" for name in ("torch", "transformers"))
            configuration = f"[{one.configuration}](../{EXAMPLES / one.configuration})"
            steps, peak = f"{found['steps']}, {found['traced']}", f"{found['peak_bytes'] / 2**20:.2f} MiB"
            by = "plugin; `memtrace run`" if found["ways"] > 1 else "`memtrace run`"
            yield f"| {one.name} {found['version']} | {with_} | {configuration} | {by} | {steps} | {peak} | {shares} |"


def page() -> str:
    """Returns the page with the table of what the runs have noted."""
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END, 1)[1]}"


def main() -> int:
    """Runs the frameworks that are asked for, writes results and page, and returns 1 where one has failed."""
    parser = argparse.ArgumentParser(prog="python -m versions.frameworks", description=__doc__)
    parser.add_argument("names", nargs="*", help="packages, such as axolotl; all without")
    parser.add_argument("--environments", type=Path, default=ROOT / ".venv-versions", help="where they are kept")
    arguments = parser.parse_args()
    failed = 0
    for one in FRAMEWORKS:
        if arguments.names and one.package not in arguments.names:
            continue
        directory = arguments.environments.absolute() / one.package
        python = environment(directory, [*one.wanted, *ALWAYS], alone=[f"{one.package}=={one.version}"])
        try:
            found = measured(one, python)
        except Wrong as error:
            print(error, file=sys.stderr)
            failed = 1
            continue
        versions = installed(python, (one.package, "torch", "transformers"))
        note = {"version": versions.pop(one.package), "python": version_of(python), **versions, **found}
        RESULTS.write_text(json.dumps({**results(), one.name: note}, indent=1) + "\n")
        print(f"{one.name} {note['version']}: {found['steps']} steps, {found['traced']} traced", file=sys.stderr)
    PAGE.write_text(page())
    return failed


if __name__ == "__main__":
    sys.exit(main())
