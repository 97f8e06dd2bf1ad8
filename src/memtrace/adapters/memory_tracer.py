"""The tracer with its exports: what a `with` block, the callback and the optimizer wrapper all use."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memtrace.adapters import forgotten
from memtrace.adapters.exports import Exports
from memtrace.adapters.said import say_where, show_in_notebook, show_table
from memtrace.allocator.recording import AllocatorRecording
from memtrace.attribution.models.further import FurtherModels
from memtrace.config import TracerConfig
from memtrace.errors import ConfigError
from memtrace.exporters.drawn.notebook import RunDrawing
from memtrace.exporters.trackers.figures import Figures
from memtrace.exporters.trackers.summary import history_of
from memtrace.guard import Told
from memtrace.oom.failure import out_of_memory
from memtrace.record.breakdown import StepRecord
from memtrace.record.oom.report import OomReport
from memtrace.record.snapshot import RunState, Snapshot
from memtrace.sources.at_exit import at_exit
from memtrace.sources.events import EventSource
from memtrace.sources.failures import FAILURES
from memtrace.sources.termination import TERMINATION
from memtrace.tracing.tracer import Tracer


class MemoryTracer(Tracer):
    """Traces a plain PyTorch loop, and exports what it sees while it is attached.

    ```python
    with MemoryTracer(model, optimizer) as tracer:
        for batch in batches:
            ...  # forward, backward, optimizer.step()
    print(tracer.latest.moments[Moment.PEAK][Category.ACTIVATIONS])
    ```

    On stderr of the first process of each machine one line says where metrics and step log are, and the table of the
    last traced step follows at the end: after `detach()`, or where the process ends without it. A run that an exception
    or a signal has ended has no table. `quiet=True` silences both.

    Args:
        model: the module that is trained; of several networks `nn.ModuleList([generator, critic])`.
        optimizers: one optimizer or several that update it. With several a step ends with the cycle: see `Tracer`.
        config: settings; the defaults serve metrics on port 16368 + local rank and write the step log to
            `memtrace-runs/<run_name>`.
        default_log_dir: where the step log goes when the settings do not say.
        explicit_steps: whether the loop calls `begin_step()` and `end_step()`.
        source: where allocator events come from; by default the device's own.
        further_models: the models beside the trained one, by name: see `tracer.Tracer`.
        **settings: fields of `TracerConfig`, in the place of those of `config`.

    Raises:
        ConfigError: a setting is unknown or out of range, or the model or an optimizer cannot be used.
        OutputError: on attach, where the port, the address or the log directory cannot be used.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        config: TracerConfig | None = None,
        *,
        default_log_dir: Path | None = None,
        explicit_steps: bool = False,
        source: EventSource | None = None,
        further_models: Mapping[str, Any] | FurtherModels | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(
            model,
            optimizers,
            _settings(config, settings),
            explicit_steps=explicit_steps,
            source=source,
            further_models=further_models,
        )
        self._default_log_dir = default_log_dir
        self._exports: Exports | None = None
        self._on_record = None if self.config.on_record is None else Told(self.config.on_record, "on_record")
        self._figures = Figures()
        self._handled: int | None = None
        """Identity of the exception that was being handled when the exports were opened: it is not of the run."""
        self._until_end = ExitStack()
        """What tells of the end of the process, while the exports are open."""

    @property
    def log_path(self) -> Path | None:
        """File of the step log; None where none is written."""
        return None if self._exports is None else self._exports.log_path

    @property
    def url(self) -> str | None:
        """Address of the metrics; None where none are served."""
        return None if self._exports is None else self._exports.url

    def figures(self) -> dict[str, float]:
        """Returns what a tracker shows of a run, by key: see docs/trackers.md. Each call begins anew.

        `accelerator.log({"loss": loss, **tracer.figures()}, step=step)`. The peak and its categories are those of the
        steps since the call before. Sizes are in GiB, 2**30 bytes; what is not known has no key.
        """
        return self._figures.take(self._published.snapshot)

    def show(self) -> None:
        """Shows the run so far: in a notebook drawn, elsewhere the table on stderr, and nothing before the first step.

        Drawn are what to do first, what the peak of each recent step is made of, the timeline of the traced step with
        the highest peak, and the table. A record and `tracer.history` draw themselves where a cell ends with them.
        """
        snapshot = self.snapshot()
        run = history_of(self.history, snapshot, self.config.max_tokens)
        if run is not None and not show_in_notebook(RunDrawing(run=run)):
            show_table(snapshot)

    def attach(self) -> None:
        """Installs the hooks and opens the exports; a tracer that is attached already is left as it is."""
        if self._exports is not None:
            return
        super().attach()
        if self.attached:
            self._guard.set_up(self._open_exports, undo=self.detach)

    def _open_exports(self) -> None:
        forgotten.begins(self)
        run_dir = self._default_log_dir or Path("memtrace-runs") / self.identity.run_name
        log_dir = self.config.log_path(run_dir)
        exports = Exports.open(
            _weak_snapshot(self),
            self.identity,
            self.config,
            log_dir,
            recording=_weak_recording(self),
            on_record=_weak_on_record(self),
        )
        # Where the script ends, or drops the tracer, without a detach, the port and the log are given back too.
        self._end_exports = weakref.finalize(self, _end, exports, self._until_end)
        self._exports, self._handled = exports, id(sys.exc_info()[1])
        self._until_end.callback(at_exit(exports.exits))  # before the finalizer: what is registered last runs first
        self._until_end.callback(FAILURES.subscribe(None, self._crashed, cuda=False, on_exit=self._exits))
        self._until_end.callback(TERMINATION.subscribe(exports.terminated))
        self._until_end.callback(at_exit(self._process_ends))  # before the exports do
        self.add_listener(self._figures.note)
        self.add_listener(exports.write)
        if self._watch is not None:
            self._until_end.enter_context(forgotten.collect_in_forward(self, self._watch.model))
        if self._speaks:
            say_where(exports.url, exports.log_path)

    def _tell(self, record: StepRecord) -> None:
        if self._on_record is not None:
            self._on_record(record)

    @property
    def _speaks(self) -> bool:
        return not self.config.quiet and self.identity.local_rank == 0

    def _process_ends(self) -> None:
        """Shows the table where the process ends before the tracer is detached."""
        self._guard.finish(self._show_table)

    def _show_table(self) -> None:
        if self._speaks and self._exports is not None and self._exports.ends_well:
            show_table(self.snapshot())

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self.report_failure(error)
            self._crashed(error)
        self.detach()

    def _crashed(self, error: BaseException) -> None:
        """Notes what has ended the run."""
        if self._exports is not None:
            self._guard.finish(partial(self._exports.ends, _state_after(error, self.identity.device)))

    def _exits(self, error: BaseException) -> None:
        """Notes how the run ends if the script leaves now."""
        if self._exports is not None:
            self._guard.finish(partial(self._exports.may_end, _state_after(error, self.identity.device)))

    def give_way(self) -> None:
        """Detaches because the training begins anew under another tracer: no failure, and no scrape is waited for."""
        if self._exports is not None:
            self._guard.finish(self._exports.give_way)
        self.detach()

    def detach(self) -> None:
        """Takes off the hooks, shows the table, then closes the exports.

        Where that is done for an exception, in `finally` or `except`, it is what has ended the run.
        """
        error = sys.exc_info()[1]
        if error is not None and id(error) != self._handled:
            self._crashed(error)
        with ExitStack() as ending:  # each of them, also where Ctrl-C comes into another
            ending.callback(self._guard.finish, self._drop_exports)
            ending.callback(self._guard.finish, self._show_table)
            ending.callback(self._guard.finish, partial(forgotten.ends, self))
            super().detach()

    def _drop_exports(self) -> None:
        exports = self._exports
        with self._until_end:
            if exports is not None:
                exports.close()
                self._exports = None  # not before: where Ctrl-C has come, they are closed again, or with the tracer
                self._end_exports.detach()
                self.remove_listener(exports.write)
                self.remove_listener(self._figures.note)

    def _publish_oom(self, report: OomReport) -> Path | None:
        super()._publish_oom(report)
        return None if self._exports is None else self._exports.write_oom(report)


def _settings(config: object, settings: Mapping[str, Any]) -> TracerConfig:
    """Returns the settings of a configuration and of keyword arguments together.

    Raises:
        ConfigError: the configuration is none, a setting is unknown or out of range.
    """
    if config is not None and not isinstance(config, TracerConfig):
        kind = type(config).__name__
        raise ConfigError(f"config must be a TracerConfig, got {kind}: write settings as keywords, such as port=0")
    return (config or TracerConfig()).with_settings(settings)


def _end(exports: Exports, until_end: ExitStack) -> None:
    """Ends the exports of a tracer that is gone, without waiting for anything."""
    with until_end:
        exports.end()


def _state_after(error: BaseException, device: str) -> RunState:
    """Returns how a run has ended that an exception has ended. `sys.exit(1)` stands for what was being handled then."""
    if isinstance(error, KeyboardInterrupt):
        return RunState.SIGNAL
    if isinstance(error, GeneratorExit) or (isinstance(error, SystemExit) and error.code in (None, 0)):
        return RunState.OK
    if isinstance(error, SystemExit) and error.__context__ is not None:
        return _state_after(error.__context__, device)
    return RunState.EXCEPTION if out_of_memory(error, torch.device(device).type) is None else RunState.OUT_OF_MEMORY


def _weak_on_record(tracer: MemoryTracer) -> Callable[[StepRecord], None] | None:
    """Returns what calls `on_record`, None where there is none: without keeping alive what that function refers to."""
    if tracer.config.on_record is None:
        return None
    told = weakref.WeakMethod(tracer._tell)

    def tell(record: StepRecord) -> None:
        found = told()
        if found is not None:
            found(record)

    return tell


def _weak_snapshot(tracer: Tracer) -> Callable[[], Snapshot | None]:
    """Returns `tracer.snapshot` without keeping the tracer, and through it the model, alive; it returns None then."""
    alive = weakref.ref(tracer)

    def snapshot() -> Snapshot | None:
        found = alive()
        return None if found is None else found.snapshot()

    return snapshot


def _weak_recording(tracer: Tracer) -> Callable[[], AllocatorRecording | None]:
    """Returns what returns `tracer.allocator_recording`, in the same way."""
    alive = weakref.ref(tracer)

    def recording() -> AllocatorRecording | None:
        found = alive()
        return None if found is None else found.allocator_recording

    return recording
