"""Categories in the user's own history of the allocator: what is known of each block, written while it is live."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from memtrace.attribution.ledger import Ledger
from memtrace.attribution.scan import Scan
from memtrace.sources.autograd_torch_private import backward_is_running
from memtrace.sources.events import Annotator, TagEvent


class Annotations:
    """Writes categories into the history that the user records, in steps that have a record.

    Each such step writes them anew: a ring forgets, and nothing tells that a recording was begun anew. What memtrace
    records for itself is left as it is.

    Args:
        scan: knows the tensors of the training.
        ledger: knows what has a stronger role than to be saved for the backward pass; its device is the one meant.
        annotator: writes; None where nothing is to be written.
    """

    def __init__(self, scan: Scan, ledger: Ledger, annotator: Annotator | None) -> None:
        self._scan, self._ledger, self._annotator = scan, ledger, annotator

    def optimizer_begins(self, optimizer: torch.optim.Optimizer, *, first: bool) -> None:
        """Writes which blocks are gradients; those of one optimizer where it steps inside the backward pass.

        Args:
            optimizer: that is about to use them.
            first: whether none has stepped in this step: its gradients are then still to be written.
        """
        if backward_is_running() and not self._scan.engines:
            self._write(lambda ledger: self._scan.claim_gradients_of(optimizer, ledger))
        elif first:
            self._write(self._scan.claim_gradients)

    def step_ends(self) -> None:
        """Writes weights, buffers, master weights, optimizer state, tensors of engines, and gradients that are left."""
        self._write(lambda ledger: self._scan.claim_persistent(ledger, anew=False))

    def saved(self, tensor: torch.Tensor, tags: Sequence[TagEvent]) -> None:
        """Writes what a tensor is that autograd saves, unless its storage is known for something else."""
        if self._annotator is not None and self._ledger.role_of(tensor) is None and self._annotator.user_records():
            self._annotator.annotate(tags)

    def _write(self, claim: Callable[[Ledger], None]) -> None:
        if self._annotator is not None and self._annotator.user_records():
            found = Ledger(self._ledger.device)
            claim(found)
            self._annotator.annotate(found.live())
