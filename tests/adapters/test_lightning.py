"""The Lightning callback, in a real Trainer on the CPU."""

from __future__ import annotations

import json
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from memtrace.adapters.lightning import MemTraceLightningCallback, trained_module
from memtrace.categories import Category, Moment

FEATURES, HIDDEN = 32, 64
PARAMETERS = FEATURES * HIDDEN + HIDDEN + HIDDEN + 1
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "logger": False,
}


class Regression(pl.LightningModule):
    """One network, called by `training_step`; can fail at a batch."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))
        self.losses: list[float] = []
        self._fail_at = fail_at

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        if batch_idx == self._fail_at:
            raise RuntimeError("out of data")
        loss = self.network(batch[0]).square().mean()
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.network(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(32, FEATURES, generator=torch.Generator().manual_seed(0))), 4)


def fit(directory: Any, callbacks: list[Any], *, fail_at: int | None = None) -> Regression:
    torch.manual_seed(0)
    model = Regression(fail_at)
    trainer = pl.Trainer(
        max_epochs=1, accumulate_grad_batches=2, callbacks=callbacks, default_root_dir=directory, **QUIET
    )
    trainer.fit(model, loader(), loader())
    return model


def callback() -> MemTraceLightningCallback:
    return MemTraceLightningCallback(strict=True, port=0, device_poll_seconds=0)


@pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
class TestFit:
    def test_a_step_is_an_optimizer_step(self, tmp_path):
        """Eight batches, of which two are accumulated each, are four steps; one of them at least is traced."""
        watched = callback()
        fit(tmp_path, [watched])
        records = [json.loads(line) for line in (tmp_path / "memtrace" / "steps-rank0.jsonl").read_text().splitlines()]
        assert [record["step"] for record in records] == [1, 2, 3, 4]
        assert any(record["traced"] for record in records)
        assert {record["batch"]["tokens"] for record in records} == {2 * 4 * FEATURES}

    def test_categories_have_their_closed_form(self, tmp_path):
        """Weights, gradients and both moments have four bytes a parameter; law 1 at every moment."""
        watched = callback()
        fit(tmp_path, [watched])
        record = next(record for record in watched.tracer.history if record.traced)
        for moment in record.moments.values():
            assert moment.total_bytes == moment.allocated_bytes
            assert moment[Category.WEIGHTS] == 4 * PARAMETERS
        end = record.moments[Moment.BACKWARD_END]
        assert end[Category.GRADIENTS] == 4 * PARAMETERS
        assert end[Category.OPTIMIZER_STATE] == 8 * PARAMETERS + 4 * 4
        assert record.moments[Moment.FORWARD_END][Category.ACTIVATIONS] > 0

    def test_training_is_the_same(self, tmp_path):
        """Losses and weights have the bits of the run without the callback."""
        plain, watched = fit(tmp_path, []), fit(tmp_path, [callback()])
        assert watched.losses == plain.losses
        assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))

    def test_a_run_that_fails_leaves_nothing_behind(self, tmp_path):
        """The port and the hooks are given back, and the callback can be used again."""
        watched = callback()
        with pytest.raises(RuntimeError, match="out of data"):
            fit(tmp_path, [watched], fail_at=5)
        assert not watched.tracer.attached
        fit(tmp_path, [watched])
        assert watched.tracer.latest.step == 4


def test_the_one_network_of_a_module_is_what_is_watched():
    """Lightning calls `training_step`, which calls the network."""
    model = Regression()
    assert trained_module(model) is model.network


def test_a_module_with_several_networks_is_watched_itself():
    """None of them has all the parameters."""
    model = pl.LightningModule()
    model.encoder, model.decoder = nn.Linear(2, 2), nn.Linear(2, 2)
    assert trained_module(model) is model
