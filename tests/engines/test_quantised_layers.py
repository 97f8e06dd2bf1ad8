"""Layers of the packages that quantise, frozen under LoRA of PEFT: those whose packages are there.

In the development environment that is bitsandbytes; `make test-packages` has the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_training import EVERY_STEP, born
from torch import nn

from memtrace import Category, Moment, StepRecord
from memtrace.config import TracerConfig
from memtrace.tracing.tracer import Tracer
from versions import packages

INSIDE, OUTSIDE, GROUP, RANK, STEPS = 128, 256, 64, 4, 3
WIDTHS = INSIDE + OUTSIDE
WEIGHTS = 2 * INSIDE * OUTSIDE
"""Elements of both layers."""
GROUPS = WEIGHTS // GROUP
BY_DEFAULT = TracerConfig(strict=True, port=None, step_log=False, device_poll_seconds=0)


def bitsandbytes_4(layer: nn.Linear) -> nn.Module:
    import bitsandbytes

    quantised = bitsandbytes.nn.Linear4bit(
        layer.in_features, layer.out_features, bias=False, quant_type="nf4", compress_statistics=True
    )
    quantised.load_state_dict(layer.state_dict())
    return quantised.to("cpu")


def bitsandbytes_8(layer: nn.Linear) -> nn.Module:
    import bitsandbytes

    quantised = bitsandbytes.nn.Linear8bitLt(layer.in_features, layer.out_features, bias=False, has_fp16_weights=False)
    quantised.load_state_dict(layer.state_dict())
    return quantised.to("cpu")


def hqq(layer: nn.Linear) -> nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    settings = BaseQuantizeConfig(nbits=4, group_size=GROUP)
    return HQQLinear(layer, settings, compute_dtype=torch.bfloat16, device="cpu")


def scales_and_zeros(layer: nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (layer.out_features, layer.in_features // GROUP)
    return torch.full(shape, 0.02), torch.full(shape, 8)


def packed(kind: type, layer: nn.Linear, *more: torch.Tensor) -> nn.Module:
    """Returns a layer of gptqmodel with the weights of a linear one."""
    quantised = kind(
        bits=4, group_size=GROUP, sym=True, desc_act=False, bias=False,
        in_features=layer.in_features, out_features=layer.out_features,
    )  # fmt: skip
    quantised.pack(layer, *scales_and_zeros(layer), *more)
    quantised.post_init()
    return quantised


def gptq(layer: nn.Linear) -> nn.Module:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    return packed(TorchLinear, layer, torch.arange(layer.in_features, dtype=torch.int32) // GROUP)


def awq(layer: nn.Linear) -> nn.Module:
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    return packed(AwqTorchLinear, layer)


def torchao(name: str) -> Callable[[nn.Linear], nn.Module]:
    def make(layer: nn.Linear) -> nn.Module:
        from torchao import quantization

        parent = nn.Sequential(layer.bfloat16())
        quantization.quantize_(parent, getattr(quantization, name)())
        return parent[0]

    return make


def quanto(name: str) -> Callable[[nn.Linear], nn.Module]:
    def make(layer: nn.Linear) -> nn.Module:
        from optimum import quanto

        parent = nn.Sequential(layer.bfloat16())
        quanto.quantize(parent, weights=getattr(quanto, name))
        quanto.freeze(parent)
        return parent[0]

    return make


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer of a package, and what two of them weigh in bytes: packed weights, scales, what the package needs."""

    package: str
    make: Callable[[nn.Linear], nn.Module]
    frozen: int


LAYERS = {
    "bitsandbytes, 4 bits, quantised twice": Layer(
        package="bitsandbytes",
        make=bitsandbytes_4,
        # absmax in 8 bits, of it one scale for 256 and one offset a layer, and the two tables of values
        frozen=WEIGHTS // 2 + GROUPS + 4 * (GROUPS // 256 + 2 + 2 * (16 + 256)),
    ),
    "bitsandbytes, 8 bits": Layer(package="bitsandbytes", make=bitsandbytes_8, frozen=WEIGHTS + 4 * WIDTHS),
    "HQQ": Layer(package="hqq", make=hqq, frozen=WEIGHTS // 2 + 2 * 2 * GROUPS),
    "GPTQ": Layer(
        package="gptqmodel",
        make=gptq,
        frozen=WEIGHTS // 2 + GROUPS // 2 + 2 * GROUPS + 4 * WIDTHS + 2 * 4 * 8,  # an index of groups, eight shifts
    ),
    "AWQ": Layer(package="gptqmodel", make=awq, frozen=WEIGHTS // 2 + GROUPS // 2 + 2 * GROUPS),
    "torchao, int8": Layer(
        package="torchao", make=torchao("Int8WeightOnlyConfig"), frozen=WEIGHTS + WIDTHS + 4 * WIDTHS
    ),
    "torchao, int8, activations too": Layer(
        package="torchao", make=torchao("Int8DynamicActivationInt8WeightConfig"), frozen=WEIGHTS + WIDTHS + 4 * WIDTHS
    ),
    "torchao, float8": Layer(package="torchao", make=torchao("Float8WeightOnlyConfig"), frozen=WEIGHTS + 4 * WIDTHS),
    "quanto, int8": Layer(package="optimum.quanto", make=quanto("qint8"), frozen=WEIGHTS + 2 * WIDTHS),
    "quanto, int4": Layer(package="optimum.quanto", make=quanto("qint4"), frozen=WEIGHTS // 2 + 2 * 2 * WEIGHTS // 128),
}


def is_there(package: str) -> bool:
    parents = package.split(".")[:-1]
    return all(find_spec(parent) for parent in parents) and find_spec(package) is not None


INSTALLED = [name for name, layer in LAYERS.items() if is_there(layer.package)]


def test_the_packages_are_those_of_the_environment() -> None:
    """What has a row is installed by `make test-packages`, or everywhere."""
    names = {layer.package.replace(".", "-") for layer in LAYERS.values()} - {"bitsandbytes"}
    assert names == {package.partition("==")[0] for package in packages.LAYERS}


class Net(nn.Module):
    """Two quantised layers with a whole one between them."""

    def __init__(self, make: Callable[[nn.Linear], nn.Module]) -> None:
        super().__init__()
        self.first = make(nn.Linear(INSIDE, OUTSIDE, bias=False))
        self.norm = nn.LayerNorm(OUTSIDE, dtype=torch.bfloat16)
        self.second = make(nn.Linear(OUTSIDE, INSIDE, bias=False))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.second(self.norm(self.first(rows)))


@dataclass(frozen=True, kw_only=True)
class Run:
    """Losses and records of a training."""

    losses: Sequence[float]
    records: Sequence[StepRecord]


def train(layer: Layer, config: TracerConfig | None) -> Run:
    """Trains adapters on the frozen layers; where every step is traced, from before they are made."""
    torch.manual_seed(0)
    with born() if config is EVERY_STEP else nullcontext() as source:
        model = get_peft_model(
            Net(layer.make).requires_grad_(False), LoraConfig(r=RANK, target_modules=["first", "second"])
        ).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        with Tracer(model, optimizer, config, source=source) if config else nullcontext() as tracer:
            for _ in range(STEPS):
                loss = model(torch.randn(4, 8, INSIDE, dtype=torch.bfloat16)).float().square().mean()
                loss.backward()
                losses.append(loss.item())
                del loss
                optimizer.step()
                optimizer.zero_grad()
    return Run(losses=losses, records=list(tracer.history) if tracer else [])


@pytest.fixture(scope="module", params=INSTALLED)
def runs(request) -> tuple[Layer, Mapping[str, Run]]:
    layer = LAYERS[request.param]
    ways = {"plain": None, "every step": EVERY_STEP, "by default": BY_DEFAULT}
    return layer, {way: train(layer, config) for way, config in ways.items()}


def test_training_is_the_same(runs) -> None:
    """Losses have the bits of the run without memtrace."""
    _, found = runs
    assert found["every step"].losses == found["plain"].losses
    assert found["by default"].losses == found["plain"].losses


def test_the_base_is_frozen_weights(runs) -> None:
    """To the byte in traced and counted steps, adapters beside it; categories add up, a few numbers have no owner."""
    layer, found = runs
    expected = {"frozen": layer.frozen + 2 * 2 * OUTSIDE, "trainable": 4 * 2 * RANK * WIDTHS}
    for way in ("every step", "by default"):
        assert len(found[way].records) == STEPS
        for record in found[way].records:
            sizes = dict.fromkeys(expected, 0)
            for key, size in record.moments[Moment.STEP_END].entries.items():
                if key.category is Category.WEIGHTS:
                    sizes[key.component] += size
            assert sizes == expected
            for moment in record.moments.values() if record.traced else ():
                assert moment.total_bytes == moment.allocated_bytes
                assert moment[Category.UNATTRIBUTED] <= 64
                assert moment[Category.BUFFERS] <= 8
