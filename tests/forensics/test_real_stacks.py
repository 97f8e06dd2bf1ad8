"""Rules about stacks, met by the stacks of a real training on a CPU in the form that snapshots have."""

from __future__ import annotations

import pickle
import traceback
import weakref
from typing import Any

import model_families
import pytest
import torch
from planning.larger_families import _GROUPED, SIZE
from torch.utils._python_dispatch import TorchDispatchMode

from memtrace.forensics.attribution.joined import attribute
from memtrace.forensics.history import read_history
from memtrace.forensics.loader import load_snapshot
from memtrace.record.categories import Category
from memtrace.record.readings.snapshot_reading import Source


class _Recorder(TorchDispatchMode):
    """Writes down each storage that an operator makes, with the Python stack, and when it goes."""

    def __init__(self) -> None:
        super().__init__()
        self.trace: list[dict[str, Any]] = []
        self.addresses: dict[int, int] = {}
        """Of storages that are there, by the address of their memory."""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        result = function(*arguments, **(named or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes():
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        pointer = storage.data_ptr()
        if pointer in self.addresses:
            return
        frames = [
            {"filename": frame.f_code.co_filename, "line": line, "name": frame.f_code.co_name}
            for frame, line in traceback.walk_stack(None)
        ]
        self.addresses[pointer] = address = (len(self.trace) + 1) << 32
        self._write("alloc", address, storage.nbytes(), frames)
        weakref.finalize(storage, self._free, pointer, storage.nbytes())

    def _free(self, pointer: int, nbytes: int) -> None:
        self._write("free_completed", self.addresses.pop(pointer), nbytes, [])

    def _write(self, action: str, address: int, nbytes: int, frames: list[dict[str, Any]]) -> None:
        self.trace.append({"action": action, "addr": address, "size": nbytes, "stream": 0, "frames": frames})


@pytest.mark.long
def test_stacks_of_a_real_training_tell_weights_and_states(tmp_path):
    """Of transformers' Llama and torch's AdamW: every state and every cast weight, and no state but these."""
    torch.manual_seed(0)
    model = model_families.llama(SIZE, **_GROUPED).double()
    recorder = _Recorder()
    with recorder:
        model.float()
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        for _ in range(3):
            model(**SIZE.sequence_to_sequence()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    states = {
        recorder.addresses[tensor.untyped_storage().data_ptr()]
        for state in optimizer.state.values()
        for name, tensor in state.items()
        if name.startswith("exp_avg")
    }
    weights = {recorder.addresses[parameter.untyped_storage().data_ptr()] for parameter in model.parameters()}
    path = tmp_path / "s.pickle"
    path.write_bytes(pickle.dumps({"segments": [], "device_traces": [recorder.trace]}, protocol=4))
    snapshot = load_snapshot(path)
    found = attribute(read_history(snapshot, 0), snapshot.stacks, None)
    told: dict[Category, set[int]] = {}
    for index, life in enumerate(found.history.timeline.lifetimes):
        label = found.label(index)
        if label.source is Source.STACK and life.nbytes > 64:
            told.setdefault(label.category, set()).add(life.address)
    assert found.lives.steps.whole >= 2
    assert told[Category.OPTIMIZER_STATE] == states
    assert told[Category.WEIGHTS] >= weights
    assert {*told} <= {Category.OPTIMIZER_STATE, Category.WEIGHTS, Category.TEMPORARIES}
