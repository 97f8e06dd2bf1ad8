"""The file of cases: what it may say, and what is said of what it may not."""

from __future__ import annotations

from pathlib import Path

import pytest

from memtrace.errors import ConfigError
from memtrace.gate.case_file import case_lines, find_case_file, read_case_file
from memtrace.gate.cases import Case, Tolerance
from memtrace.planning.sharding.shares import Sharding, Strategy

CASES = """
baseline = "ci/memory.json"
pythonpath = ["src", "."]

[cases.small]
config = "configs/small.json"
seq_len = 128
sharding = "zero2"
world_size = 4
tolerance = "1%"

  [cases."big.one"]
build = "package.module:build"
batch = "package.module:Batches.one"
tolerance = 1024
"""


def written(directory: Path, text: str, name: str = "memtrace.toml") -> Path:
    path = directory / name
    path.write_text(text, encoding="utf-8")
    return path


def test_cases_are_read_with_their_defaults(tmp_path: Path) -> None:
    """In the order of their names, paths begin at the file, and each has a line for annotations."""
    file = read_case_file(written(tmp_path, CASES))
    assert [*file.cases] == ["big.one", "small"]
    assert file.cases["small"] == Case(
        name="small",
        config="configs/small.json",
        seq_len=128,
        sharding="zero2",
        world_size=4,
        tolerance=Tolerance(share=0.01),
    )
    assert file.cases["small"].shared() == Sharding(strategy=Strategy.ZERO2, world_size=4)
    assert file.cases["big.one"].tolerance == Tolerance(nbytes=1024)
    assert file.baseline == tmp_path / "ci" / "memory.json"
    assert file.python_path == (tmp_path / "src", tmp_path)
    assert case_lines(file) == {"small": 5, "big.one": 12}


def test_a_project_file_has_a_table_for_them(tmp_path: Path) -> None:
    """memtrace.toml comes first; a pyproject.toml without the table has no cases, and the message says what would."""
    project = written(tmp_path, "[tool.ruff]\n", "pyproject.toml")
    with pytest.raises(ConfigError, match=r"expected memtrace.toml with \[cases.NAME\], or pyproject.toml"):
        find_case_file(tmp_path)
    with pytest.raises(ConfigError, match=r"no table \[tool.memtrace\]"):
        read_case_file(project)
    project.write_text('[tool.memtrace.cases.one]\nconfig = "one.json"\n')
    assert find_case_file(tmp_path) == project
    file = read_case_file(project)
    assert [*file.cases] == ["one"] and case_lines(file) == {"one": 1}
    assert find_case_file(written(tmp_path, CASES).parent).name == "memtrace.toml"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cases = ", "is not TOML"),
        ("", "no cases: expected at least one table"),
        ("[cases]\n", "no cases: expected at least one table"),
        ("cases = 3\n", "no cases: expected at least one table"),
        ("[cases.a]\n", "case a: give it either config or build"),
        ("[cases]\na = 1\n", "case a must be a table, got 1"),
        ('[cases.a]\nconfig = "a"\nbuild = "b:c"\n', "not both and not neither"),
        ('[cases.a]\nconfig = "a"\nseqlen = 1\n', "unknown key 'seqlen': did you mean 'seq_len'?"),
        ('[cases.a]\nconfig = "a"\nseq_len = "1"\n', "seq_len must be a whole number, got '1'"),
        ('[cases.a]\nconfig = "a"\nseq_len = true\n', "seq_len must be a whole number, got True"),
        ('[cases.a]\nconfig = "a"\npadded = 1\n', "padded must be true or false, got 1"),
        ('[cases.a]\nconfig = "a"\nloss = "b:c"\n', "loss does not go together with config"),
        ('[cases.a]\nbuild = "b:c"\ndtype = "float16"\n', "dtype does not go together with build"),
        ('[cases.a]\nbuild = "b.c"\n', "build must be such as package.module:function, got 'b.c'"),
        ('[cases.a]\nconfig = "a"\ntolerance = -1\n', "case a: tolerance must be a size such as 64MiB or a share"),
        ('[cases.a]\nbuild = "b:c"\nbatch = "b:d"\nseq_len = 8\n', "seq_len has no meaning where the function b:d"),
        ('[cases.a]\nconfig = "a"\ntolerance = "much"\n', "case a: a size must be a number and a unit"),
        ('[cases."a b"]\nconfig = "a"\n', "the name of a case must be letters, digits"),
        ('baselin = "a"\n[cases.a]\nconfig = "a"\n', "unknown key 'baselin': did you mean 'baseline'?"),
        ('baseline = 1\n[cases.a]\nconfig = "a"\n', "baseline must be a path, got 1"),
        ('pythonpath = "src"\n[cases.a]\nconfig = "a"\n', "pythonpath must be a list of paths, got 'src'"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, said: str) -> None:
    """Each message begins with the file."""
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as raised:
        read_case_file(path)
    assert said in str(raised.value) and str(raised.value).startswith(str(path))


def test_words_of_sharding_are_checked() -> None:
    """The message lists those that there are."""
    with pytest.raises(ConfigError, match="sharding must be one of none, ddp, zero0"):
        Case(name="a", config="a", sharding="zero").shared()


@pytest.mark.parametrize(
    ("value", "before", "most"),
    [(0, 100, 100), (7, 100, 107), ("1KiB", 100, 1124), ("10%", 100, 110), ("2.5 %", 1000, 1025), ("0%", 5, 5)],
)
def test_a_tolerance_allows_growth_up_to_it(value: int | str, before: int, most: int) -> None:
    """And whatever is less."""
    tolerance = Tolerance.of(value)
    assert tolerance.allows(before, most) and tolerance.allows(before, 0)
    assert not tolerance.allows(before, most + 1)
