"""TRL's trainers of preferences and rewards, with all the models that they hold, beside themselves without memtrace."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import trl
from peft import LoraConfig
from test_other_trainers import LORA, QUIET, VOCABULARY, losses, tokenizer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, Trainer

from memtrace import Category, MemTraceCallback, Moment, StepRecord

pytestmark = pytest.mark.needs("trainers of TRL 1.16")

STEPS, ROWS = QUIET["max_steps"], 8
LORA_OF_REWARDS = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS")
GENERATED: dict[str, Any] = {"num_generations": 2, "max_completion_length": 6}


def words(row: int, count: int) -> str:
    return " ".join(f"w{2 + (7 * row + word) % 90}" for word in range(count))


def column(offset: int, count: int, *, space: str = "") -> list[str]:
    return [space + words(row + offset, count) for row in range(ROWS)]


PROMPTS = {"prompt": column(0, 4)}
PREFERENCES = PROMPTS | {"chosen": column(1, 5, space=" "), "rejected": column(2, 3, space=" ")}
JUDGED = PROMPTS | {"completion": column(1, 5, space=" "), "label": [row % 2 == 0 for row in range(ROWS)]}
PAIRS = {"chosen": column(0, 4), "rejected": column(1, 6)}


def by_length(completions: list[str], **_: Any) -> list[float]:
    """A reward that is a function."""
    return [float(len(completion) % 7) for completion in completions]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A language model and a reward model with their tokenizer, as a hub has them: references are loaded by path."""
    directory = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1,
    }  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(directory / "language")
    LlamaForSequenceClassification(LlamaConfig(**sizes, num_labels=1)).save_pretrained(directory / "reward")
    for path in directory.iterdir():
        tokenizer().save_pretrained(path)
    return directory


def language(saved: Path) -> nn.Module:
    return LlamaForCausalLM.from_pretrained(saved / "language")


def rewarding(saved: Path) -> nn.Module:
    return LlamaForSequenceClassification.from_pretrained(saved / "reward", num_labels=1)


@dataclass(frozen=True, kw_only=True)
class Form:
    """A trainer with its configuration, and the names of the models that it holds beside the trained one."""

    name: str
    """As in `DPOTrainer` and `DPOConfig`."""
    rows: Mapping[str, list[Any]]
    further: Mapping[str, Callable[[Path], nn.Module]]
    make: Callable[[Path], nn.Module] = language
    settings: Mapping[str, Any] = ()
    arguments: Callable[[Path], Mapping[str, Any]] = lambda saved: {}

    def trainer(self, saved: Path, output: Path, callbacks: list[Any]) -> Trainer:
        torch.manual_seed(0)
        configuration = getattr(trl, f"{self.name}Config")(output_dir=str(output), **QUIET, **dict(self.settings))
        return getattr(trl, f"{self.name}Trainer")(
            model=self.make(saved),
            args=configuration,
            train_dataset=datasets.Dataset.from_dict(dict(self.rows)),
            processing_class=tokenizer(),
            callbacks=callbacks,
            **self.arguments(saved),
        )


def adapted(configuration: LoraConfig = LORA, **more: Any) -> Callable[[Path], Mapping[str, Any]]:
    return lambda saved: {"peft_config": configuration, **more}


REFERENCE = {"ref_model": language}
_online = partial(Form, rows=PROMPTS, arguments=lambda saved: {"reward_funcs": by_length})
SHORT = {
    "dpo": Form(name="DPO", rows=PREFERENCES, further=REFERENCE),
    "kto": Form(name="KTO", rows=JUDGED, further=REFERENCE),
    "grpo, a model rewards": Form(
        name="GRPO",
        rows=PROMPTS,
        further=REFERENCE | {"reward_funcs": rewarding},
        settings=GENERATED | {"beta": 0.1},
        arguments=lambda saved: {"reward_funcs": [rewarding(saved), by_length]},
    ),
    "reward": Form(name="Reward", rows=PAIRS, further={}, make=rewarding),
    "dpo, lora": Form(name="DPO", rows=PREFERENCES, further={}, arguments=adapted()),
}
LONG = {
    "dpo, the reference follows": Form(
        name="DPO", rows=PREFERENCES, further=REFERENCE, settings={"sync_ref_model": True, "ref_model_sync_steps": 1}
    ),
    "dpo, the reference was asked before": Form(
        name="DPO", rows=PREFERENCES, further={}, settings={"precompute_ref_log_probs": True}
    ),
    "kto, lora": Form(name="KTO", rows=JUDGED, further={}, arguments=adapted()),
    "grpo": _online(name="GRPO", further=REFERENCE, settings=GENERATED | {"beta": 0.1}),
    "grpo, without reference": _online(name="GRPO", further={}, settings=GENERATED),
    "grpo, each batch twice": _online(
        name="GRPO",
        further=REFERENCE,
        settings=GENERATED | {"beta": 0.1, "num_iterations": 2, "gradient_accumulation_steps": 2},
    ),
    "grpo, checkpointing": _online(
        name="GRPO", further=REFERENCE, settings=GENERATED | {"beta": 0.1, "gradient_checkpointing": True}
    ),
    "grpo, lora": Form(
        name="GRPO", rows=PROMPTS, further={}, settings=GENERATED | {"beta": 0.1},
        arguments=adapted(reward_funcs=by_length),
    ),
    "rloo": _online(name="RLOO", further=REFERENCE, settings=GENERATED),
    "reward, lora": Form(name="Reward", rows=PAIRS, further={}, make=rewarding, arguments=adapted(LORA_OF_REWARDS)),
    "distillation": Form(
        name="Distillation", rows=PROMPTS, further={"teacher_model": language}, settings={"max_completion_length": 6},
        arguments=lambda saved: {"teacher_model": language(saved)},
    ),
}  # fmt: skip
FORMS = SHORT | LONG


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run without memtrace, one with every step traced, one with default settings."""

    form: Form
    plain: Trainer
    watched: Mapping[str, Trainer]
    records: Mapping[str, list[StepRecord]]


WAYS: dict[str, dict[str, Any]] = {"every step": {"trace_every": 1}, "by default": {}}


@pytest.fixture(
    scope="module", params=[*SHORT, *(pytest.param(name, marks=pytest.mark.long) for name in LONG)], ids=str
)
def run(request, saved, tmp_path_factory) -> Run:
    form, directory = FORMS[request.param], tmp_path_factory.mktemp("run")
    plain = form.trainer(saved, directory / "plain", [])
    plain.train()
    watched, records = {}, {}
    for way, settings in WAYS.items():
        callback = MemTraceCallback(strict=True, port=None, device_poll_seconds=0, **settings)
        watched[way] = form.trainer(saved, directory / way, [callback])
        watched[way].train()
        records[way] = list(callback.tracer.history)
    return Run(form=form, plain=plain, watched=watched, records=records)


def kept(model: nn.Module) -> int:
    """Returns the bytes of a further model: parameters, once where they are tied, and buffers."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def test_training_is_the_same(run):
    """Losses and weights have the bits of the run without the callback."""
    for trainer in run.watched.values():
        assert losses(trainer) == losses(run.plain)
        pairs = zip(run.plain.model.parameters(), trainer.model.parameters(), strict=True)
        assert all(torch.equal(plain, watched) for plain, watched in pairs)
    assert len(losses(run.plain)) == STEPS


def test_each_step_has_its_record(run):
    """One for each step of the optimizer, and by default one of them is traced."""
    for records in run.records.values():
        assert [record.step for record in records] == list(range(1, STEPS + 1))
    assert all(record.traced for record in run.records["every step"])
    assert any(record.traced for record in run.records["by default"])


def test_categories_add_up_and_nothing_is_left(run):
    """Law 1 at every moment; of what nobody claims a few numbers, at the peak and between steps."""
    for records in run.records.values():
        for record in (record for record in records if record.traced):
            for moment in record.moments.values():
                assert moment.total_bytes == moment.allocated_bytes
                assert moment[Category.UNATTRIBUTED] <= 64
            peak = record.moments[Moment.PEAK]
            assert peak[Category.UNATTRIBUTED] <= 0.01 * peak.total_bytes


def test_weights_are_those_of_each_model(run, saved):
    """Reference, reward model and teacher by the names of the trainer's attributes, traced and counted; with adapters
    the base is its own reference."""
    parameters = list(run.watched["every step"].model.parameters())
    expected = {name: kept(make(saved)) for name, make in run.form.further.items()}
    for component, wanted in (("trainable", True), ("frozen", False)):
        size = sum(parameter.nbytes for parameter in parameters if parameter.requires_grad is wanted)
        expected |= {component: size} if size else {}
    for records in run.records.values():
        for record in records:
            entries = record.moments[Moment.STEP_END].entries
            assert {key.component: n for key, n in entries.items() if key.category is Category.WEIGHTS} == expected
