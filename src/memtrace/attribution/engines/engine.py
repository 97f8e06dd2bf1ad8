"""What memtrace asks of a training engine: the base of one file for each engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn

from memtrace.attribution.hidden import HiddenBuffers
from memtrace.attribution.ledger import Ledger
from memtrace.attribution.models.contents import Role
from memtrace.record.limitations import Limitation


class Engine:
    """What an engine holds beside the model and the optimizer, and when its optimizer steps.

    The answers here are those of an engine that holds nothing; a subclass overrides what is different. Nothing is
    kept: every call looks at the engine's own attributes as they are now, and an attribute that a version of the
    engine does not have holds nothing.
    """

    name: str
    """As people write it, such as `DeepSpeed ZeRO-2`."""

    prepares_gradients: bool = False
    """Whether gradients are converted between the last one and the optimizer's step: the backward pass ends with the
    last gradient then, not where the optimizer begins."""

    leaves_gradients: bool = False
    """Whether gradients are in `.grad` of the model's parameters until the loop drops them."""

    shards: bool = False
    """Whether the states, or the weights too, are spread over the ranks."""

    limitation: Limitation | None = None
    """What cannot be read of the engine that is there; None where all of it can."""

    @property
    def device(self) -> torch.device | None:
        """Where the engine computes, if it can hold the parameters elsewhere; None where they are."""
        return None

    def claim(self, ledger: Ledger) -> None:
        """Claims what is held between steps. Run before the model and the optimizers are looked at: the first role of
        a storage is kept against weaker ones."""

    def claim_passing(self, ledger: Ledger) -> None:
        """Claims buckets that come and go within a step, as far as they are there now.

        Run in traced steps only, but often: when autograd saves a tensor, asks for it again or has a gradient.
        """

    def claim_kept(self, ledger: Ledger) -> None:
        """Claims the buckets that are there at the end of a step. Run once in each step without a trace."""
        self.claim_passing(ledger)

    def claim_gathered(self, module: nn.Module, ledger: Ledger) -> None:
        """Claims the weights that were put together for the forward pass of one of `gathering_modules`."""

    def gradients(self) -> Iterable[torch.Tensor]:
        """Returns the gradients that are held now in other places than `.grad` of a parameter."""
        return ()

    def role_of(self, parameter: torch.Tensor) -> Role | None:
        """Returns what the storage that a parameter has now is for; None where it is plain weights."""
        return None

    def owns(self, optimizer: torch.optim.Optimizer) -> bool:
        """Returns whether the engine has put its own tensors into the optimizer's parameter groups."""
        return False

    def updates_per_step(self, optimizer: torch.optim.Optimizer) -> int:
        """Returns how often the engine calls `optimizer.step()` in one step of the training."""
        return 1

    def gathering_modules(self) -> Iterator[nn.Module]:
        """Yields the modules whose weights are put together right before their forward pass, by an earlier hook."""
        yield from ()

    def gradient_leaves(self) -> Iterator[nn.Parameter]:
        """Yields parameters that gradients are accumulated into and that the model does not list."""
        yield from ()

    def saved_as(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Returns the parameter that autograd must keep in place of a tensor that it saves; None where that will do.

        A hook on saved tensors makes autograd keep a parameter's storage of that moment. Where the engine gives the
        parameter another storage afterwards, to free this one, the hook must keep the parameter instead.
        """
        return None

    def hidden_buffers(self) -> Sequence[HiddenBuffers]:
        """Returns what the engine says about buffers that no Python object refers to."""
        return ()

    def gradient_buffers(self) -> Sequence[tuple[HiddenBuffers, nn.Module]]:
        """Returns the buffers that gradients are views of, which stay when the loop drops these, and the module whose
        gradients those are."""
        return ()
