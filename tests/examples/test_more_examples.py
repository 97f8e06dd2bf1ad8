"""LoRA, QLoRA, Lightning, Accelerate and the notebook, run in this process: what they import is loaded once.

FSDP under torchrun is run by tests/docs/test_blocks.py, as docs/examples.md writes it.
"""

from __future__ import annotations

import ast
import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from documented import difference
from transformers.utils import logging

pytestmark = pytest.mark.long

EXAMPLES = Path(__file__).parents[2] / "examples"
SHORT = ("--max-steps", "3", "--batch-size", "4", "--max-tokens", "16", "--output-dir", "out")
PARAMETERS = 22_719_376


@pytest.fixture(autouse=True)
def in_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the notebook asks of transformers' log is taken back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEMTRACE_PORT", "0")
    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


def bytes_after(script: str, *options: str) -> dict[tuple[str, str, str], int]:
    """Returns the entries of the last traced step at the end of its backward pass; law 1 holds at all its moments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *SHORT, *options])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    lines = Path("out/memtrace/steps-rank0.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == [1, 2, 3]
    moments = [record["moments"] for record in records if record["traced"]][-1]
    for moment in moments.values():
        assert sum(entry["bytes"] for entry in moment["entries"]) == moment["allocated_bytes"]
    entries = moments["backward_end"]["entries"]
    return {(entry["category"], entry["component"], entry["dtype"]): entry["bytes"] for entry in entries}


def test_lora_freezes_the_base_and_trains_adapters(capsys: pytest.CaptureFixture[str]) -> None:
    """The base is frozen in bf16; adapters and head alone have gradients and state, four bytes each in fp32."""
    found = bytes_after("finetune_lora.py")
    assert found["weights", "frozen", "bfloat16"] == pytest.approx(2 * PARAMETERS, rel=0.001)
    trained = found["weights", "trainable", "float32"]
    assert trained < 0.02 * 4 * PARAMETERS
    assert found["gradients", "", "float32"] == found["optimizer_state", "exp_avg", "float32"] == trained
    assert "what each step's memory was for: memtrace show out/memtrace" in capsys.readouterr().out


def test_qlora_packs_the_base_and_casts_the_embedding() -> None:
    """Linear layers take half a byte an element, and a scale for each 64; the embedding is cast to fp32."""
    found = bytes_after("finetune_lora.py", "--four-bit")
    embedding, linear = 30522 * 384, 6 * 12 * 384**2 + 384**2
    assert found["weights", "frozen", "uint8"] == pytest.approx(linear / 2 + linear / 64, rel=0.001)
    assert 4 * embedding < found["weights", "frozen", "float32"] < 4.1 * embedding
    assert found["gradients", "", "float32"] < 0.02 * 4 * PARAMETERS


def test_lightning_shows_the_network_of_the_module() -> None:
    """All parameters are trained in fp32, and AdamW keeps two of each."""
    found = bytes_after("finetune_lightning.py")
    weights = found["weights", "trainable", "float32"]
    assert weights == pytest.approx(4 * PARAMETERS, rel=0.001)
    assert found["gradients", "", "float32"] == weights
    assert (
        found["optimizer_state", "exp_avg", "float32"] == found["optimizer_state", "exp_avg_sq", "float32"] == weights
    )


def test_accelerate_logs_memory_beside_the_loss(capsys: pytest.CaptureFixture[str]) -> None:
    """Every second step: the loss, and the figures of the steps since the log before."""
    found = bytes_after("finetune_accelerate.py", "--log-every", "2")
    assert found["weights", "trainable", "float32"] == pytest.approx(4 * PARAMETERS, rel=0.001)
    (logged,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    figures = dict(part.split(" ") for part in logged.removeprefix("step 2: ").split(", "))
    assert {"loss", "memtrace/peak_gib", "memtrace/peak/weights_gib", "memtrace/headroom_gib"} <= set(figures)
    assert float(figures["memtrace/peak/weights_gib"]) == pytest.approx(4 * PARAMETERS / 2**30, rel=0.01)


def printed_by(cells: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> Iterator[tuple[str, str]]:
    """Runs the cells of a notebook in one namespace; yields what each was said to print, and what it prints.

    What a cell has drawn is compared by its table, which is written to stderr here.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells:
        source = "".join(cell["source"])
        capsys.readouterr()
        exec(compile(ast.parse(source), "look_closer.ipynb", "exec"), names)
        printed = capsys.readouterr()
        for drawn in [output["data"] for output in cell["outputs"] if "data" in output]:
            assert "<polygon" in "".join(drawn["text/html"])
            yield sizes_of("".join(drawn["text/plain"])), sizes_of(printed.err)
        said = "".join("".join(output["text"]) for output in cell["outputs"] if "text" in output)
        if said or printed.out:
            yield said, printed.out


def sizes_of(table: str) -> str:
    """Returns the lines of a table from its heads to its totals."""
    return table[table.index("sizes in ") : table.index("device ")]


def test_the_notebook_shows_what_it_was_saved_with(capsys: pytest.CaptureFixture[str]) -> None:
    """Its cells print what is saved in it, and each has been run, in their order."""
    notebook = json.loads((EXAMPLES / "look_closer.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for said, shown in printed_by(cells, capsys):
        assert said
        assert difference(said, shown) is None, difference(said, shown)
