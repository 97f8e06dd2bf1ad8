"""What the callback forecasts in a real Trainer."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import datasets
import psutil
import pytest
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

from memtrace import MemTraceCallback
from memtrace.record.risk_reading import RiskReading, ShapeSource

LENGTHS = (16, 40, 24, 64, 32, 48)
LONGEST = 96

pytestmark = pytest.mark.needs("choice of how Trainer samples")


def train(directory: Path, **settings: Any) -> RiskReading:
    """Trains on texts of which the longest comes last, stops before it, and returns what was forecast."""
    tokens = [[7] * length for length in (*LENGTHS, LONGEST)]
    table = datasets.Dataset.from_dict({"input_ids": tokens, "labels": tokens})
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    arguments = TrainingArguments(
        output_dir=str(directory),
        per_device_train_batch_size=1,
        max_steps=len(LENGTHS),
        train_sampling_strategy="sequential",
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    callback = MemTraceCallback(port=None, strict=True, trace_every=1, **settings)
    model = AutoModelForCausalLM.from_config(config)
    Trainer(model=model, args=arguments, train_dataset=table, callbacks=[callback]).train()
    assert callback.tracer is not None
    risk = callback.tracer.snapshot().risk
    assert risk is not None
    return risk


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "memtrace" and r.levelno >= logging.WARNING]


def test_longest_sample_of_the_dataset_is_foreseen(tmp_path: Path) -> None:
    """Before the longest sample was met, the forecast is made for it."""
    risk = train(tmp_path)
    assert risk.peak is not None
    assert risk.peak.batch.source is ShapeSource.DATASET
    assert risk.peak.batch.tokens == LONGEST
    assert risk.worst_peak_bytes is not None
    assert risk.peak.predicted_bytes > risk.worst_peak_bytes


def test_setting_goes_before_the_dataset(tmp_path: Path) -> None:
    """`max_tokens` says what the largest batch is, whatever the dataset has."""
    risk = train(tmp_path, max_tokens=1000)
    assert risk.peak is not None
    assert (risk.peak.batch.source, risk.peak.batch.tokens) == (ShapeSource.SETTING, 1000)


def test_high_risk_is_told_once_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A limit that the longest batch would exceed: one warning, with the batch, the category and a remedy."""
    resident = psutil.Process().memory_info().rss
    risk = train(tmp_path, max_tokens=10**7, device_limit_bytes=resident + 2**30)
    assert risk.oom_risk_ratio is not None
    assert risk.oom_risk_ratio > 0.9
    [text] = warnings(caplog)
    for words in ("10000000 tokens", "max_tokens", "activations", "gradient checkpointing"):
        assert words in text


def test_low_risk_is_not_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With all the memory of the machine there is nothing to say."""
    risk = train(tmp_path)
    assert risk.oom_risk_ratio is not None
    assert risk.oom_risk_ratio < 0.01
    assert warnings(caplog) == []
