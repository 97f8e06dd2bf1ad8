"""What carries the gate into continuous integration: GitHub's action, GitLab's template, the hook of pre-commit."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from checked_repository import write

from memtrace.cli import _parser

pytestmark = pytest.mark.xdist_group("checked repository")

ROOT = Path(__file__).parents[2]
ACTION = ROOT / "integrations" / "github" / "action.yml"
TEMPLATE = ROOT / "integrations" / "gitlab" / "memtrace.gitlab-ci.yml"
HOOKS = ROOT / ".pre-commit-hooks.yaml"


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(("schema", "path"), [("github-actions", ACTION), ("gitlab-ci", TEMPLATE)])
def test_files_have_the_form_that_their_reader_published(schema: str, path: Path) -> None:
    """The schemas are those of schemastore.org and of GitLab, as the package check-jsonschema carries them."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", str(path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_the_action_hands_every_input_to_its_script() -> None:
    """By the environment, never pasted into the shell's text, where an input could be a command."""
    action = load(ACTION)
    (step,) = action["runs"]["steps"]
    assert step["run"] == 'bash "$GITHUB_ACTION_PATH/check.sh"'
    assert sorted(step["env"].values()) == sorted(f"${{{{ inputs.{name} }}}}" for name in action["inputs"])
    script = (ACTION.parent / "check.sh").read_text(encoding="utf-8")
    assert all(f"${{{name}" in script or f"${name}" in script for name in step["env"])
    outputs = {value["value"] for value in action["outputs"].values()}
    assert outputs == {f"${{{{ steps.check.outputs.{name} }}}}" for name in re.findall(r'echo "(\w+)=', script)}


def action(directory: Path, **inputs: str) -> tuple[subprocess.CompletedProcess[str], dict[str, str], str]:
    """Runs the action's script as a runner does; returns how it ended, its outputs and the summary of the job."""
    files = {name: directory.parent / name for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
    for path in files.values():
        path.write_text("")
    (step,) = load(ACTION)["runs"]["steps"]
    ended = subprocess.run(
        ["bash", "-c", step["run"]],
        cwd=directory,
        env={
            **os.environ,
            **dict.fromkeys(step["env"], ""),
            **{name: str(path) for name, path in files.items()},
            "GITHUB_ACTION_PATH": str(ACTION.parent),
            "GITHUB_WORKSPACE": str(directory.parent),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "RUNNER_TEMP": str(directory.parent),
            **inputs,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    outputs = dict(line.split("=", 1) for line in files["GITHUB_OUTPUT"].read_text().splitlines())
    return ended, outputs, files["GITHUB_STEP_SUMMARY"].read_text(encoding="utf-8")


def test_the_action_tells_a_pull_request_what_grew(repository: Path, tmp_path: Path) -> None:
    """An annotation at the case's table, a table in the summary of the job, a file for each other reader."""
    directory = tmp_path / "repository"
    directory.mkdir()
    write(directory, width=260, first="build", second="build")
    (directory / "memtrace-baseline.json").write_bytes((repository / "memtrace-baseline.json").read_bytes())
    ended, outputs, summary = action(directory, MEMTRACE_FILE="memtrace.toml", MEMTRACE_CASES="first")
    assert ended.returncode == 1, ended.stderr
    error, last = ended.stdout.splitlines()
    assert error.startswith("::error file=repository/memtrace.toml,line=2,title=memtrace%3A first grew::first grew: ")
    assert "%0A    weights trainable float32 of 0: +1.02 KiB, 65.00 KiB before%0A" in error
    assert last == "memtrace check, 1 case: 1 grew"
    assert summary.startswith("**Memory of 1 case: 1 grew**") and "| `weights trainable float32` | `0` |" in summary
    assert outputs["status"] == "1" and Path(outputs["markdown"]).read_text(encoding="utf-8") == summary
    assert ElementTree.parse(outputs["junit"]).getroot().get("failures") == "1"


def test_the_action_says_so_where_there_is_no_report(tmp_path: Path) -> None:
    """A repository without cases: exit status 2, and an annotation beside what the command says."""
    directory = tmp_path / "repository"
    directory.mkdir()
    ended, outputs, summary = action(directory)
    assert ended.returncode == 2 and outputs["status"] == "2" and not summary
    assert ended.stdout.startswith("::error title=memtrace check::It ended with status 2")
    assert "has no cases: expected memtrace.toml" in ended.stderr


def test_commands_of_template_and_hook_are_commands() -> None:
    """They are parsed by the command itself; the template keeps the reports that it writes."""
    job = load(TEMPLATE)[".memtrace-check"]
    (line,) = job["script"]
    options = shlex.split(line.replace("$MEMTRACE_OPTIONS ", ""))[3:]
    arguments = _parser().parse_args(options)
    assert arguments.format == ["text", f"junit={job['artifacts']['reports']['junit']}", "markdown=memtrace-check.md"]
    assert job["artifacts"]["paths"] == ["memtrace-check.md"]
    (hook,) = load(HOOKS)
    assert _parser().parse_args(shlex.split(hook["entry"])[1:]).command.name == "check"
    assert hook["language"] == "system" and hook["pass_filenames"] is False
    files = re.compile(hook["files"])
    assert all(files.search(name) for name in ("src/model.py", "configs/llama.json", "memtrace.toml"))
    assert not files.search("README.md")
