"""Trainers beside Trainer itself: TRL's SFTTrainer, plain and with LoRA, and Seq2SeqTrainer that generates."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
import pytest
import tokenizers
import torch
from features import missing
from peft import LoraConfig
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
)
from trl import SFTConfig, SFTTrainer

from memtrace import Category, MemTraceCallback, Moment

VOCABULARY, STEPS, SAMPLES = 96, 3, 2
QUIET: dict[str, Any] = {
    "max_steps": STEPS,
    "per_device_train_batch_size": SAMPLES,
    "logging_steps": 1,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "seed": 0,
    "learning_rate": 1e-3,
}


def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{number}": number for number in range(2, VOCABULARY)} | {"<pad>": 0, "</s>": 1}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")


def sft(directory: Path, callbacks: list[Any], **settings: Any) -> Trainer:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    texts = [" ".join(f"w{2 + (7 * row + word) % 90}" for word in range(5 + 3 * row)) for row in range(8)]
    peft_config = settings.pop("peft_config", None)
    return SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=str(directory), max_length=20, **QUIET, **settings),
        train_dataset=datasets.Dataset.from_dict({"text": texts}),
        processing_class=tokenizer(),
        peft_config=peft_config,
        callbacks=callbacks,
    )


def seq2seq(directory: Path, callbacks: list[Any]) -> Trainer:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    rows = [{"input_ids": [2 + row, 3, 4, 1], "labels": [5 + row, 6, 1]} for row in range(8)]
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(directory),
        predict_with_generate=True,
        generation_max_length=6,
        eval_strategy="steps",
        eval_steps=1,
        **QUIET,
    )
    return Seq2SeqTrainer(
        T5ForConditionalGeneration(config), arguments, train_dataset=rows, eval_dataset=rows, callbacks=callbacks
    )


LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
_STRATEGY = {"packing_strategy": "wrapped"}
"""The only one, without a name, where there is no choice."""
PACKED = {"packing": True, **(_STRATEGY if _STRATEGY.keys() <= {field.name for field in fields(SFTConfig)} else {})}
RUNS: dict[str, Any] = {
    "sft": sft,
    "sft, lora": lambda directory, callbacks: sft(directory, callbacks, peft_config=LORA),
    "sft, packed": lambda directory, callbacks: sft(directory, callbacks, **PACKED),
    "sft, dft loss": lambda directory, callbacks: sft(directory, callbacks, loss_type="dft"),
    "seq2seq": seq2seq,
}
DFT = "DFT loss of SFTTrainer"
NAMES = [pytest.param(name, marks=pytest.mark.needs(DFT)) if "dft" in name else name for name in RUNS]


def train(name: str, directory: Path, callbacks: list[Any]) -> Trainer:
    trainer = RUNS[name](directory, callbacks)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """Each run without and with the callback."""
    found = {}
    for name in RUNS:
        if "dft" in name and missing(DFT):
            continue
        directory = tmp_path_factory.mktemp("run")
        callback = MemTraceCallback(strict=True, port=0, device_poll_seconds=0, trace_every=1)
        plain, watched = train(name, directory / "plain", []), train(name, directory / "watched", [callback])
        log = directory / "watched" / "memtrace" / "steps-rank0.jsonl"
        records = [json.loads(line) for line in log.read_text().splitlines()]
        found[name] = {"plain": plain, "watched": watched, "records": callback.tracer.history, "log": records}
    return found


def losses(trainer: Trainer) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history for name in ("loss", "eval_loss") if name in entry]


@pytest.mark.parametrize("name", NAMES)
def test_training_is_the_same(runs, name):
    """Losses, of the evaluation too, and weights have the bits of the run without the callback."""
    plain, watched = runs[name]["plain"], runs[name]["watched"]
    assert losses(watched) == losses(plain)
    assert len(losses(plain)) == STEPS * (2 if name == "seq2seq" else 1)
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), watched.model.parameters(), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_a_training_step(runs, name):
    """One line of the log for each; what generates between them is part of none."""
    assert [record["step"] for record in runs[name]["log"]] == list(range(1, STEPS + 1))
    assert all(record["traced"] for record in runs[name]["log"])


@pytest.mark.parametrize("name", NAMES)
def test_categories_add_up_and_nothing_is_left(runs, name):
    """Law 1 at every moment; at the peak at most 1 % that nobody claims."""
    for record in runs[name]["records"]:
        for moment in record.moments.values():
            assert moment.total_bytes == moment.allocated_bytes
        peak = record.moments[Moment.PEAK]
        assert peak[Category.UNATTRIBUTED] <= 0.01 * peak.total_bytes


@pytest.mark.parametrize("name", NAMES)
def test_what_lasts_has_its_closed_form(runs, name):
    """Weights by frozen and trainable; gradients and both moments of the trainable ones, once where they are tied."""
    parameters = list(runs[name]["watched"].model.parameters())
    trainable = sum(parameter.nbytes for parameter in parameters if parameter.requires_grad)
    frozen = sum(parameter.nbytes for parameter in parameters if not parameter.requires_grad)
    moment = runs[name]["records"][-1].moments[Moment.BACKWARD_END]
    found = {(key.category, key.component): size for key, size in moment.entries.items()}
    assert found.get((Category.WEIGHTS, "frozen"), 0) == frozen
    assert found[Category.WEIGHTS, "trainable"] == trainable
    assert moment[Category.GRADIENTS] == trainable
    assert found[Category.OPTIMIZER_STATE, "exp_avg"] == trainable
    assert found[Category.OPTIMIZER_STATE, "exp_avg_sq"] == trainable


def test_the_shape_is_that_of_the_batch_that_sft_makes(runs):
    """Padded to the longest sample, at most `max_length`; packed without padding."""
    for record in runs["sft"]["log"]:
        samples, tokens = record["batch"]["shape"]
        assert samples == SAMPLES
        assert tokens <= 20
    assert {tuple(record["batch"]["shape"]) for record in runs["sft, packed"]["log"]} <= {(2, 20), (1, 40), (1, 20)}
