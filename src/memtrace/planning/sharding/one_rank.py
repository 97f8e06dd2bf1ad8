"""What a strategy makes of a model and of its updates, as one rank has them in a simulated step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from torch import nn

from memtrace.errors import PlanError
from memtrace.planning.optimizers.updates import MakeOptimizer, Updates, updates_of
from memtrace.planning.recipe import Recipe
from memtrace.planning.sharding.shares import Sharding, Strategy
from memtrace.simulation.kernels import Target
from memtrace.simulation.mode import Simulation


def check_sharding(recipe: Recipe, sharding: Sharding) -> None:
    """Checks that a recipe can be simulated under a strategy.

    Raises:
        PlanError: it cannot.
    """
    if sharding.strategy not in (Strategy.NONE, Strategy.FSDP) and recipe.gradients_persist:
        raise PlanError(f"{sharding.strategy.label} with the recipe {recipe.name} is not simulated")
    if sharding.strategy is Strategy.DDP and recipe.master is not None:
        raise PlanError(
            f"DDP with the recipe {recipe.name} is not simulated: masters come from DeepSpeed, which is --zero 0"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class OneRank:
    """One rank of a strategy; `stack` ends what its engine needs while the step is simulated."""

    recipe: Recipe
    sharding: Sharding
    target: Target
    make_optimizer: MakeOptimizer
    stack: ExitStack

    def model(self, model: nn.Module) -> nn.Module:
        """Returns the model as this rank holds it, where the real engine can shard it."""
        if self.sharding.strategy is not Strategy.FSDP:
            return model
        from memtrace.planning.sharding.updates import fully_sharded  # noqa: PLC0415 - torch.distributed takes a second
        from memtrace.simulation.fake_ranks import check_fsdp, fake_ranks  # noqa: PLC0415

        check_fsdp()
        self.stack.enter_context(fake_ranks(self.sharding.rank, self.sharding.world_size))
        return fully_sharded(model, self.recipe, self.sharding)

    def further_model(self, model: nn.Module, updates: Updates) -> nn.Module:
        """Returns a further model as this rank holds it: shared out where the trained one is."""
        if self.sharding.strategy is Strategy.FSDP:
            from memtrace.planning.sharding.updates import OffloadedUpdates, fully_sharded  # noqa: PLC0415 - as above

            model = fully_sharded(model, self.recipe, self.sharding, trained=False)
            if isinstance(updates, OffloadedUpdates):
                updates.offload(model)
        if self.sharding.strategy is Strategy.ZERO3:
            from memtrace.planning.sharding.zero3 import Zero3Updates  # noqa: PLC0415

            assert isinstance(updates, Zero3Updates)
            updates.shard_beside(model)
        return model

    def updates(self, model: nn.Module, simulation: Simulation) -> Updates:
        """Returns what updates the model, as this rank holds it, in the way of the strategy."""
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        sharding, make = self.sharding, self.make_optimizer
        if sharding.strategy is Strategy.NONE:
            return updates_of(self.recipe, trainable, make)
        if sharding.strategy is Strategy.FSDP and not sharding.offloads_weights:
            return Updates(trainable, make)
        if not sharding.is_zero:
            from memtrace.planning.sharding.updates import (  # noqa: PLC0415 - torch.distributed takes a second
                DdpUpdates,
                OffloadedUpdates,
            )

            if sharding.strategy is Strategy.FSDP:
                return OffloadedUpdates(model, make, simulation)
            return DdpUpdates(trainable, make, gradients_are_views=sharding.gradient_as_bucket_view)
        return self._zero_updates(model, trainable, simulation)

    def _zero_updates(self, model: nn.Module, trainable: Sequence[nn.Parameter], simulation: Simulation) -> Updates:
        from memtrace.planning.sharding.zero import Zero0Updates, ZeroUpdates  # noqa: PLC0415 - as above
        from memtrace.planning.sharding.zero3 import Zero3Updates  # noqa: PLC0415
        from memtrace.planning.sharding.zero3_modules import ZeroFunctions  # noqa: PLC0415

        if self.sharding.strategy is Strategy.ZERO3:
            updates = Zero3Updates(model, self.make_optimizer, self.sharding, self.target, simulation.on_host)
            self.stack.enter_context(ZeroFunctions(updates.fetching))
            return updates
        if self.sharding.strategy is Strategy.ZERO0:
            return Zero0Updates(trainable, self.make_optimizer, self.sharding)
        return ZeroUpdates(trainable, self.make_optimizer, self.sharding, simulation.on_host)
