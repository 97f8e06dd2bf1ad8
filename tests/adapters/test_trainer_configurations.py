"""transformers' own Trainer behaves as without memtrace, in every configuration of a table.

The callback stands among Trainer's defaults, as it does where an operator puts it into every job, and traces every
step. Losses, metrics, what Trainer decides, and the final weights are compared bit by bit.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import bitsandbytes
import datasets
import pytest
import torch
import transformers.trainer
from torch import nn
from torch.nn import functional as F
from transformers import (
    EarlyStoppingCallback,
    LlamaConfig,
    LlamaForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import BestRun, HPSearchBackend
from transformers.training_args import OptimizerNames

from memtrace import Category, MemTraceCallback, Moment


@pytest.fixture(scope="module", autouse=True)
def settings_of_bitsandbytes() -> Iterator[None]:
    """Takes back what Trainer tells bitsandbytes of each embedding, for all of the process and by `id`."""
    yield
    bitsandbytes.optim.GlobalOptimManager.get_instance().initialize()


STEPS, VOCABULARY, LENGTH = 4, 64, 12
_MEASURED = ("runtime", "samples_per_second", "steps_per_second", "tokens_per_second", "model_preparation_time")
CHANGING = {f"{phase}_{name}" for phase in ("train", "eval", "test") for name in _MEASURED}
"""What Trainer measures with a clock."""

Metrics = Mapping[str, float]
Body = Callable[[Trainer], Any]


def llama(width: int = 16, **more: Any) -> LlamaForCausalLM:
    """The one model: two layers, with dropout so that random numbers count."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        attention_dropout=0.1,
        max_position_embeddings=32,
        **more,
    )
    return LlamaForCausalLM(config)


def without_arguments() -> LlamaForCausalLM:
    """The model for `model_init`, which takes no arguments."""
    return llama()


def rows(count: int = 32, *, length: int = LENGTH) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCABULARY, (count, length), generator=generator).tolist()
    return [{"input_ids": row, "labels": row, "attention_mask": [1] * length} for row in tokens]


class Streaming(torch.utils.data.IterableDataset[Any]):
    """A dataset without a length."""

    def __iter__(self) -> Any:
        return iter(rows())


def _train(trainer: Trainer) -> Metrics:
    return dict(trainer.train().metrics)


def _twice(trainer: Trainer) -> Any:
    return _train(trainer), _train(trainer)


def _then_resume(trainer: Trainer) -> Any:
    """Trains, forgets, and goes on from the checkpoint in the middle."""
    trainer.train()
    directory = Path(trainer.args.output_dir) / "checkpoint-2"
    return dict(trainer.train(resume_from_checkpoint=str(directory)).metrics)


def _then_predict(trainer: Trainer) -> Any:
    trainer.train()
    found = trainer.predict(trainer.eval_dataset)
    return found.predictions.tolist(), dict(found.metrics), trainer.evaluate()


def _then_generate(trainer: Trainer) -> Any:
    """Predicts by generation between two runs."""
    trainer.train()
    inputs = torch.tensor([row["input_ids"] for row in rows(2)])
    generated = trainer.model.generate(inputs, max_new_tokens=4, do_sample=False, pad_token_id=0).tolist()
    return generated, _train(trainer)


def _fails_and_goes_on(trainer: Trainer) -> Any:
    class Crash(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2:
                raise KeyboardInterrupt

    crash = Crash()
    trainer.add_callback(crash)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(crash)
    return _train(trainer)


def _two_in_turns(trainer: Trainer) -> Any:
    """A second trainer, with a model and arguments of its own, between two runs of the first one."""
    arguments = copy.copy(trainer.args)
    second = Trainer(model=llama(), args=arguments, train_dataset=rows(16), eval_dataset=rows(4))
    return _train(trainer), _train(second), _train(trainer), _weights(second.model)


class _Search:
    """A backend for a hyperparameter search that needs no further package: two learning rates, one after the other."""

    def ensure_available(self) -> None:
        pass

    def default_hp_space(self, _: object) -> dict[str, float]:
        return {}

    def run(self, trainer: Trainer, n_trials: int, direction: str, **_: Any) -> BestRun:
        losses = []
        for number in range(n_trials):
            trainer.args.learning_rate = 0.01 / (number + 1)
            trainer.train()
            losses.append(trainer.state.log_history[-1]["train_loss"])
        best = min(range(n_trials), key=losses.__getitem__)
        return BestRun(str(best), losses[best], {"losses": losses})


def _search(trainer: Trainer) -> Any:
    return trainer.hyperparameter_search(n_trials=2, backend="ray", direction="minimize")


class _OwnLoss(Trainer):
    """Computes the loss itself, with a second forward pass for a consistency term."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        labels = inputs.pop("labels")
        first, second = model(**inputs).logits, model(**inputs).logits
        loss = F.cross_entropy(first.flatten(0, 1), labels.flatten()) + F.mse_loss(first, second.detach())
        return (loss, {"logits": first}) if return_outputs else loss


class _SkipsBadLosses(Trainer):
    """Leaves out the backward pass of every other batch, as trainers do whose loss is not finite."""

    def training_step(self, model: nn.Module, inputs: Any, *rest: Any) -> torch.Tensor:
        if self.state.global_step % 2:
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach()
        return super().training_step(model, inputs, *rest)


class _ClipsByValue(TrainerCallback):
    def on_pre_optimizer_step(self, *_: Any, model: nn.Module, **__: Any) -> None:
        nn.utils.clip_grad_value_(model.parameters(), 0.01)


class _StopsEarly(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        control.should_training_stop = state.global_step >= 3
        control.should_evaluate = state.global_step == 2
        return control


class _ModelCalledOutside(TrainerCallback):
    """Runs the model, with gradients, where no step is: before training and between two steps."""

    def on_substep_end(self, *_: Any, model: nn.Module, **__: Any) -> None:
        model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.sum()

    on_train_begin = on_substep_end
    on_step_end = on_substep_end


class _TooLarge(LlamaForCausalLM):
    """Runs out of memory past a number of samples."""

    most = 3

    def forward(self, input_ids: Any, attention_mask: Any = None, labels: Any = None, **more: Any) -> Any:
        more |= {"attention_mask": attention_mask, "labels": labels}
        if self.training and len(input_ids) > self.most:
            logits = super().forward(input_ids, **more).logits
            assert logits.requires_grad
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().forward(input_ids, **more)


class _Limited(LlamaForCausalLM):
    """Runs out of memory where the hidden states alive, those of steps that failed before included, are too many."""

    most = 5 * LENGTH * 16 * 4
    """Bytes of the last hidden state of five samples."""
    alive: list[weakref.ref[torch.UntypedStorage]]

    def forward(self, input_ids: Any, attention_mask: Any = None, labels: Any = None, **more: Any) -> Any:
        more |= {"attention_mask": attention_mask, "labels": labels, "output_hidden_states": self.training}
        outputs = super().forward(input_ids, **more)
        if self.training:
            self.alive = [*getattr(self, "alive", []), weakref.ref(outputs.hidden_states[-1].untyped_storage())]
            held = sum(storage.nbytes() for reference in self.alive if (storage := reference()) is not None)
            if held > self.most:
                raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            outputs.hidden_states = None
        return outputs


def _of(kind: type[LlamaForCausalLM]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = kind(llama().config)
        model.load_state_dict(llama().state_dict())
        return model

    return make


def _lora() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    base = llama()
    torch.manual_seed(1)
    return get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.1))


def _partly_frozen() -> nn.Module:
    model = llama()
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    return model


def _with_unused_head() -> nn.Module:
    model = llama()
    model.unused = nn.Linear(16, 4)
    return model


def _table(**columns: Any) -> datasets.Dataset:
    return datasets.Dataset.from_list(
        [{**row, **{n: v[i] for n, v in columns.items()}} for i, row in enumerate(rows())]
    )


def _adagrad_and_scheduler(model: nn.Module) -> Any:
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.01)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """One way to use Trainer."""

    arguments: Mapping[str, Any] = field(default_factory=dict)
    model: Callable[[], nn.Module] = llama
    body: Body = _train
    trainer: type[Trainer] = Trainer
    made_of: type[TrainingArguments] = TrainingArguments
    callbacks: Sequence[Callable[[], TrainerCallback]] = ()
    data: Callable[[], Any] = rows
    more: Callable[[nn.Module], Mapping[str, Any]] = lambda _: {}


def _with(**arguments: Any) -> Configuration:
    return Configuration(arguments=arguments)


_CHECKPOINTING = {"gradient_checkpointing": True}
_EVALUATION = {"eval_strategy": "steps", "eval_steps": 2}
_SAVING = {"save_strategy": "steps", "save_steps": 2}
_PACKAGES = {
    "galore": "galore_torch",
    "apollo": "apollo_torch",
    "lomo": "lomo_optim",
    "adalomo": "lomo_optim",
    "grokadamw": "grokadamw",
    "stable_adamw": "optimi",
    "adamw_torch_4bit": "torchao",
    "adamw_torch_8bit": "torchao",
    "adamw_anyprecision": "torchdistx",
}
"""What must be installed for the names that begin so."""
_ELSEWHERE = ("adamw_apex_", "adamw_torch_xla", "adamw_torch_npu")
"""How the names begin that need another device."""
_OF_BITSANDBYTES = ("ademamix", "lion", "paged_", "rmsprop_bnb", "adamw_8bit", "adamw_bnb")
_NAMES = [name.value for name in OptimizerNames if not name.value.startswith(_ELSEWHERE)]
_OPTIMIZERS = [name for name in _NAMES if not name.startswith(tuple(_PACKAGES))]
"""Each name of `optim=` that runs on a CPU with the packages of the tests."""
_FAIL = ("adalomo", "galore_adamw_8bit", "galore_adafactor_layerwise")
"""How the names begin that fail without memtrace too: two packages ask for CUDA, the third for a learning rate less."""
_INSTALLED = tuple(name for name, package in _PACKAGES.items() if find_spec(package) is not None)
"""How the names begin whose packages are there."""
_SCHEDULERS: dict[str, dict[str, Any]] = {
    "cosine": {},
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {},
    "constant": {},
    "constant_with_warmup": {},
    "inverse_sqrt": {},
    "cosine_with_min_lr": {"min_lr": 1e-4},
    "warmup_stable_decay": {"num_decay_steps": 2},
}

_TARGETS = {"optim_target_modules": ["q_proj", "down_proj"], "optim_args": "rank=4,update_proj_gap=2"}
"""What optimizers must be told whose state is of low rank."""

TABLE: dict[str, Configuration] = {
    "plain": Configuration(),
    "epochs": _with(max_steps=-1, num_train_epochs=2, per_device_train_batch_size=8),
    "accumulation": _with(gradient_accumulation_steps=2),
    "accumulation with a rest": _with(gradient_accumulation_steps=3, max_steps=-1, num_train_epochs=1),
    "checkpointing": _with(**_CHECKPOINTING, gradient_checkpointing_kwargs={"use_reentrant": False}),
    "reentrant checkpointing": _with(**_CHECKPOINTING, gradient_checkpointing_kwargs={"use_reentrant": True}),
    "checkpointing, accumulation and autocast": _with(**_CHECKPOINTING, gradient_accumulation_steps=2, bf16=True),
    "label smoothing": _with(label_smoothing_factor=0.1),
    "NEFTune": _with(neftune_noise_alpha=5.0),
    "bf16 autocast": _with(bf16=True),
    "bf16 weights": Configuration(model=lambda: llama().to(torch.bfloat16)),
    "bf16 evaluation": _with(**_EVALUATION, bf16_full_eval=True),
    "no clipping": _with(max_grad_norm=0.0),
    "tight clipping": _with(max_grad_norm=0.01),
    "clipping in a callback": Configuration(callbacks=[_ClipsByValue]),
    "weight decay and warmup": _with(weight_decay=0.1, warmup_steps=2),
    "evaluation between steps": _with(**_EVALUATION),
    "evaluation at the start": _with(**_EVALUATION, eval_on_start=True),
    "evaluation in parts": _with(**_EVALUATION, eval_accumulation_steps=1),
    "evaluation of the loss only": _with(**_EVALUATION, prediction_loss_only=True),
    "metrics": Configuration(
        arguments=_EVALUATION,
        more=lambda _: {"compute_metrics": lambda found: {"mean": float(found.predictions.mean())}},
    ),
    "metrics batch by batch": Configuration(
        arguments={**_EVALUATION, "batch_eval_metrics": True},
        more=lambda _: {"compute_metrics": lambda found, compute_result: {"mean": float(found.predictions.mean())}},
    ),
    "prediction": Configuration(body=_then_predict),
    "generation": Configuration(body=_then_generate),
    "sequence to sequence": Configuration(trainer=Seq2SeqTrainer, made_of=Seq2SeqTrainingArguments),
    "checkpoints": _with(**_SAVING, save_total_limit=1),
    "resume": Configuration(arguments=_SAVING, body=_then_resume),
    "resume without skipping data": Configuration(arguments={**_SAVING, "ignore_data_skip": True}, body=_then_resume),
    "best model at the end": _with(**_SAVING, **_EVALUATION, load_best_model_at_end=True),
    "early stopping": Configuration(
        arguments={**_SAVING, **_EVALUATION, "load_best_model_at_end": True, "max_steps": 8},
        callbacks=[lambda: EarlyStoppingCallback(1, 10.0)],
    ),
    "plateau": Configuration(arguments={**_EVALUATION, "lr_scheduler_type": "reduce_lr_on_plateau"}),
    "control from a callback": Configuration(callbacks=[_StopsEarly]),
    "model called outside of steps": Configuration(callbacks=[_ModelCalledOutside]),
    "trained twice": Configuration(body=_twice),
    "two trainers in turns": Configuration(body=_two_in_turns),
    "interrupted and trained again": Configuration(body=_fails_and_goes_on),
    "model made by Trainer": Configuration(more=lambda _: {"model": None, "model_init": without_arguments}),
    "hyperparameter search": Configuration(
        more=lambda _: {"model": None, "model_init": without_arguments}, body=_search
    ),
    "batch size found": Configuration(
        arguments={"auto_find_batch_size": True, "per_device_train_batch_size": 5}, model=_of(_TooLarge)
    ),
    "batch size found by what is alive": Configuration(
        arguments={"auto_find_batch_size": True, "per_device_train_batch_size": 6}, model=_of(_Limited)
    ),
    "grouped by length": _with(train_sampling_strategy="group_by_length"),
    "grouped by a column of lengths": Configuration(
        arguments={"train_sampling_strategy": "group_by_length"}, data=lambda: _table(length=list(range(32)))
    ),
    "in order": _with(train_sampling_strategy="sequential"),
    "last batch dropped": _with(dataloader_drop_last=True, per_device_train_batch_size=5, max_steps=-1),
    "workers": _with(dataloader_num_workers=1, max_steps=2),
    "split batches": _with(accelerator_config={"split_batches": True}, per_device_train_batch_size=4),
    "a stream": Configuration(data=Streaming),
    "a table with further columns": Configuration(data=lambda: _table(text=["a"] * 32)),
    "further columns kept": _with(remove_unused_columns=False),
    "own loss": Configuration(trainer=_OwnLoss, arguments=_EVALUATION),
    "loss function": Configuration(
        more=lambda _: {
            "compute_loss_func": lambda outputs, labels, num_items_in_batch=None: F.cross_entropy(
                outputs.logits.flatten(0, 1), labels.flatten()
            )
        }
    ),
    "losses that are skipped": Configuration(trainer=_SkipsBadLosses),
    "logits in another place": Configuration(
        arguments=_EVALUATION,
        more=lambda _: {"preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1)},
    ),
    "optimizer and scheduler given": Configuration(more=lambda model: {"optimizers": _adagrad_and_scheduler(model)}),
    "optimizer class given": Configuration(
        more=lambda _: {"optimizer_cls_and_kwargs": (torch.optim.NAdam, {"lr": 0.01, "momentum_decay": 0.01})}
    ),
    "LoRA": Configuration(model=_lora),
    "LoRA with checkpointing": Configuration(
        model=_lora, arguments={**_CHECKPOINTING, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    ),
    "partly frozen": Configuration(model=_partly_frozen),
    "a head that is not used": Configuration(model=_with_unused_head),
    "tied weights": Configuration(model=lambda: llama(tie_word_embeddings=True)),
    "eager attention": Configuration(model=lambda: llama(attn_implementation="eager")),
    "other seeds": _with(data_seed=3, seed=5),
    "tokens counted": _with(include_num_input_tokens_seen="all"),
    **{
        f"schedule {name}": _with(lr_scheduler_type=name, lr_scheduler_kwargs=kwargs, warmup_steps=1)
        for name, kwargs in _SCHEDULERS.items()
    },
    **{
        f"optimizer {name}": Configuration(
            arguments={"optim": name, **(_TARGETS if name.startswith(("galore", "apollo")) else {})},
            model=lambda: llama(64),
        )
        for name in _NAMES
        if name.startswith(_INSTALLED) and not name.startswith(_FAIL)
    },
}
OPTIMIZERS = {name: Configuration(arguments={"optim": name}, model=lambda: llama(64)) for name in _OPTIMIZERS}
"""With matrices that are large enough for state of 8 bits."""
COMPILED: dict[str, Configuration] = {
    "eager": _with(torch_compile=True, torch_compile_backend="eager"),
    "aot_eager": _with(torch_compile=True, torch_compile_backend="aot_eager"),
    "with evaluation": _with(torch_compile=True, torch_compile_backend="eager", **_EVALUATION),
    "with checkpointing": _with(torch_compile=True, torch_compile_backend="eager", **_CHECKPOINTING),
}


def _weights(model: nn.Module) -> list[list[float]]:
    return [parameter.detach().float().flatten().tolist() for parameter in model.parameters()]


def _state_bytes(optimizer: Any) -> int:
    """Returns the bytes of what the innermost optimizer has in its state and in tables of its own."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    held = [*optimizer.state.values(), *(value for value in vars(optimizer).values() if isinstance(value, dict))]
    tensors = [value for state in held for value in state.values() if torch.is_tensor(value)]
    return sum({tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def _unchanging(value: Any) -> Any:
    """Returns a result without what a clock has measured."""
    if isinstance(value, Mapping):
        return {key: _unchanging(part) for key, part in value.items() if key not in CHANGING}
    return [_unchanging(part) for part in value] if isinstance(value, (list, tuple)) else value


def _run(configuration: Configuration, directory: Path) -> dict[str, Any]:
    """Returns all that can be compared of one run."""
    torch.manual_seed(0)
    model = configuration.model()
    settings = {
        "output_dir": str(directory),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 0.01,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "seed": 11,
        "use_cpu": True,
        "log_level": "error",
    }
    trainer = configuration.trainer(
        **{
            "model": model,
            "args": configuration.made_of(**{**settings, **configuration.arguments}),
            "train_dataset": configuration.data(),
            "eval_dataset": rows(8),
            "callbacks": [make() for make in configuration.callbacks],
            **configuration.more(model),
        }
    )
    answer = configuration.body(trainer)
    return {
        "answer": _unchanging(answer),
        "log": _unchanging(trainer.state.log_history),
        "weights": _weights(trainer.model),
        "state": _state_bytes(trainer.optimizer),
        "steps": trainer.state.global_step,
        "batch size": trainer._train_batch_size,
        "random numbers": torch.rand(3).tolist(),
    }


@pytest.fixture
def watching(monkeypatch: pytest.MonkeyPatch) -> list[MemTraceCallback]:
    """Puts the callback among Trainer's defaults, to trace every step; returns those that Trainers have made."""
    return _watching(monkeypatch, trace_every=1)


def _watching(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> list[MemTraceCallback]:
    made: list[MemTraceCallback] = []

    class Watching(MemTraceCallback):
        def __init__(self) -> None:
            super().__init__(port=None, device_poll_seconds=0, strict=True, **settings)
            made.append(self)

    defaults = [*transformers.trainer.DEFAULT_CALLBACKS, Watching]
    monkeypatch.setattr(transformers.trainer, "DEFAULT_CALLBACKS", defaults)
    return made


def _same(configuration: Configuration, directory: Path, watching: list[MemTraceCallback]) -> dict[str, Any]:
    """Returns what the run with the callback has given."""
    watched = _run(configuration, directory / "watched")
    callbacks = list(watching)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.trainer, "DEFAULT_CALLBACKS", transformers.trainer.DEFAULT_CALLBACKS[:-1])
        bare = _run(configuration, directory / "bare")
    for key, value in bare.items():
        assert watched[key] == value, key
    assert len(watching) == len(callbacks) > 0
    for callback in callbacks:
        assert callback.tracer is not None
        assert callback.tracer.snapshot().up
        assert any(record.traced for record in callback.tracer.history)
    return watched


ON_A_CPU = pytest.mark.needs("optimizers of bitsandbytes on a CPU")
SAMPLING = pytest.mark.needs("choice of how Trainer samples")
NAMES = [
    pytest.param(name, marks=[SAMPLING] if "train_sampling_strategy" in configuration.arguments else [])
    for name, configuration in TABLE.items()
]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", NAMES)
def test_trains_as_without_memtrace(
    name: str, tmp_path: Path, watching: list[MemTraceCallback], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses, metrics, decisions, random numbers and final weights have the same bits."""
    monkeypatch.setitem(transformers.trainer.ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.RAY, _Search)
    watched = _same(TABLE[name], tmp_path, watching)
    if TABLE[name].arguments.get("auto_find_batch_size"):
        assert watched["batch size"] < TABLE[name].arguments["per_device_train_batch_size"], (
            "the first one does not fit"
        )


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[ON_A_CPU] if name.startswith(_OF_BITSANDBYTES) else []) for name in OPTIMIZERS],
)
def test_every_optimizer_by_default(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the settings as they come: all of its state is found; nobody claims two losses and a norm of gradients."""
    watching = _watching(monkeypatch)
    watched = _same(OPTIMIZERS[name], tmp_path, watching)
    assert watching[0].tracer is not None
    record = watching[0].tracer.snapshot().latest_traced
    assert record is not None
    weights = 4 * sum(map(len, watched["weights"]))
    end = record.moments[Moment.STEP_END]
    assert end[Category.WEIGHTS] == weights
    assert end[Category.OPTIMIZER_STATE] == watched["state"]
    assert record.moments[Moment.BACKWARD_END][Category.GRADIENTS] == weights
    for moment in record.moments.values():
        assert moment.total_bytes == moment.allocated_bytes
        assert moment[Category.UNATTRIBUTED] <= 12


def test_the_table_of_optimizers_has_state_of_every_kind() -> None:
    """Names that begin in another way than those without a package are in it."""
    assert {"adamw_torch_fused", "adafactor", "paged_adamw_8bit", "lion_8bit", "schedule_free_sgd"} <= set(OPTIMIZERS)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_models_train_as_without_memtrace(name: str, tmp_path: Path, watching: list[MemTraceCallback]) -> None:
    """The compiler is asked anew for each run."""
    torch._dynamo.reset()
    _same(COMPILED[name], tmp_path, watching)
    torch._dynamo.reset()
    gc.collect()


def test_every_configuration_is_its_own() -> None:
    """At least forty, and no two are the same."""
    assert len(TABLE) + len(OPTIMIZERS) + len(COMPILED) >= 40
    assert len({repr(configuration) for configuration in TABLE.values()}) == len(TABLE)
