"""Recipes: which copies of a model a training set-up keeps, and in which element type.

A recipe fixes weights, master copies, gradients and the type of the arithmetic. What the optimizer keeps is in
`memtrace.planning.optimizers.states`, and who keeps which share of it in `memtrace.planning.sharding.shares`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from types import MappingProxyType

from memtrace.planning.lookup import by_name

DTYPE_BYTES: Mapping[str, int] = MappingProxyType({"float32": 4, "bfloat16": 2, "float16": 2, "uint8": 1})
"""Bytes of one element; names as torch prints them without `torch.`."""

LORA_TRAINABLE_RATIO = Fraction(2, 1000)
"""Adapter parameters for each parameter of the base model, where nobody says how many there are.

The share that Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", section 2, call commonly used: 0.2 %.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One of the tensors that together hold frozen weights."""

    component: str
    dtype: str
    bytes_each: Fraction
    """Bytes for each parameter."""
    sharded: bool = True
    """Whether engines that shard weights share it out; scales are attributes of a weight, which each rank keeps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Copies and element types; every figure is for each parameter, on one rank that holds all of the model."""

    name: str
    summary: str
    """One line for people: who trains like this."""
    weights: str
    """Type of the weights that are trained."""
    gradients: str
    """Type in which gradients wait for the optimizer."""
    compute: str
    """Type of the matrix products, and so of most saved activations."""
    source: str
    """Where the layout is documented."""
    master: str | None = None
    """Type of the higher-precision copies that the optimizer updates; None where it updates the weights."""
    casts: bool = False
    """Whether autocast makes copies of the weights in `compute`, which live from their use to the backward pass."""
    gradients_persist: bool = False
    """Whether gradients are a buffer that is zeroed, not freed, after the step."""
    frozen_base: tuple[Stored, ...] = ()
    """How the frozen base model is stored, where only adapters are trained."""
    unquantized: str | None = None
    """Type of what stays out of 4 bits, where the base is quantized: embedding, head and norms."""

    @property
    def trains_adapters(self) -> bool:
        """Whether the parameters that are trained come on top of a frozen model."""
        return bool(self.frozen_base)

    @property
    def quantizes(self) -> bool:
        """Whether the linear layers of the frozen model are held in 4 bits."""
        return self.unquantized is not None

    @property
    def loaded(self) -> str:
        """Type in which a model is loaded that is not trained; of a quantized base, what stays out of 4 bits."""
        return self.unquantized or (self.frozen_base[0].dtype if self.frozen_base else self.weights)

    @property
    def updated(self) -> str:
        """Type of the tensors that the optimizer updates: the masters where there are any."""
        return self.master or self.weights


_ZERO = 'Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", section 3.1'
_TRANSFORMERS = "Hugging Face, Transformers, guide to model training anatomy, anatomy of model memory"
_PEFT = "peft.get_peft_model, autocast_adapter_dtype: adapters are kept in float32 by default"

_BF16_BASE = (Stored(component="frozen", dtype="bfloat16", bytes_each=Fraction(2)),)

NF4_BASE = (
    Stored(component="frozen", dtype="uint8", bytes_each=Fraction(4, 8)),
    Stored(component="frozen", dtype="uint8", bytes_each=Fraction(1, 64), sharded=False),
    Stored(component="frozen", dtype="float32", bytes_each=Fraction(4, 64 * 256), sharded=False),
)
"""A base model in NF4 with double quantization: 4 bits a parameter, one 8-bit constant for each block of 64, and one
float32 constant for each 256 of those: 0.127 bits a parameter for both. Source: Dettmers et al., "QLoRA", section 3,
and `BitsAndBytesConfig(bnb_4bit_use_double_quant=True)`."""

RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        recipe.name: recipe
        for recipe in (
            Recipe(
                name="fp32",
                summary="everything in float32",
                weights="float32",
                gradients="float32",
                compute="float32",
                source=_TRANSFORMERS,
            ),
            Recipe(
                name="hf-autocast",
                summary="Trainer with bf16=True on a float32 model: float32 weights, bfloat16 products",
                weights="float32",
                gradients="float32",
                compute="bfloat16",
                casts=True,
                source="torch.autocast: casts of leaves that need gradients are cached until the context ends, and "
                "each product saves its cast for the backward pass",
            ),
            Recipe(
                name="pure-bf16",
                summary="Trainer on a bfloat16 checkpoint: everything in bfloat16, no master copy",
                weights="bfloat16",
                gradients="bfloat16",
                compute="bfloat16",
                source="transformers, from_pretrained: dtype='auto' keeps the type of the checkpoint",
            ),
            Recipe(
                name="bf16-master",
                summary="DeepSpeed with bf16: bfloat16 weights and gradients, float32 master copies",
                weights="bfloat16",
                gradients="bfloat16",
                compute="bfloat16",
                master="float32",
                source=_ZERO,
            ),
            Recipe(
                name="fp16-master",
                summary="DeepSpeed or Apex with fp16: float16 weights and gradients, float32 master copies",
                weights="float16",
                gradients="float16",
                compute="float16",
                master="float32",
                source=_ZERO,
            ),
            Recipe(
                name="megatron",
                summary="Megatron-LM with bf16: as bf16-master, but gradients are summed in a float32 buffer",
                weights="bfloat16",
                gradients="float32",
                compute="bfloat16",
                master="float32",
                gradients_persist=True,
                source="Megatron-LM, docs, distributed optimizer: bf16 parameters with fp32 gradients take 18 bytes "
                "each, 6 + 12/d with the distributed optimizer",
            ),
            Recipe(
                name="lora",
                summary="peft LoRA on a bfloat16 model: frozen bfloat16 base, float32 adapters",
                weights="float32",
                gradients="float32",
                compute="bfloat16",
                casts=True,
                frozen_base=_BF16_BASE,
                source=_PEFT,
            ),
            Recipe(
                name="qlora",
                summary="peft LoRA on a 4-bit model: frozen NF4 base with double quantization, float32 adapters",
                weights="float32",
                gradients="float32",
                compute="bfloat16",
                casts=True,
                frozen_base=NF4_BASE,
                unquantized="bfloat16",
                source='Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", section 3',
            ),
            Recipe(
                name="qlora-kbit",
                summary="qlora after prepare_model_for_kbit_training: embedding, head and norms in float32",
                weights="float32",
                gradients="float32",
                compute="bfloat16",
                casts=True,
                frozen_base=NF4_BASE,
                unquantized="float32",
                source="peft.prepare_model_for_kbit_training: all 16-bit parameters are cast to float32",
            ),
        )
    }
)
"""Every recipe, by name."""


DEEPSPEED_CONVERTS = (
    "DeepSpeed with bf16 turns all floating-point weights into bfloat16, keeps float32 masters of those that are "
    "trained, and casts nothing: the recipe is planned so."
)
"""What is said of a recipe with autocast under DeepSpeed."""


def under_deepspeed(recipe: Recipe) -> Recipe:
    """Returns what DeepSpeed with bf16 makes of a recipe with autocast; any other as it is.

    It turns all floating-point weights into 16 bits, updates float32 masters and casts nothing. Source: DeepSpeed,
    runtime/engine.py, `_configure_distributed_model` (`self.module.bfloat16()`).
    """
    if not recipe.casts:
        return recipe
    unquantized = recipe.compute if recipe.quantizes else None
    return replace(
        recipe,
        weights=recipe.compute,
        gradients=recipe.compute,
        master="float32",
        casts=False,
        unquantized=unquantized,
    )


def find_recipe(name: str) -> Recipe:
    """Returns the recipe with this name.

    Raises:
        PlanError: there is none; the message proposes the nearest.
    """
    return by_name("recipe", name, RECIPES)
