"""The metric catalogue: every Prometheus metric that memtrace exports.

The exporter, the documentation page and the tests of the dashboards read it here. A metric is listed once something
computes it. Where a value is not known, its series is absent; it is never 0, -1 or NaN.
"""

from __future__ import annotations

from memtrace.record import glossary
from memtrace.record.categories import Moment
from memtrace.record.metric import Metric, MetricType, Unit

MAX_SERIES = 80
"""Upper bound of the series of one rank, whatever the model."""

EXPORTED_MOMENTS: tuple[Moment, ...] = (Moment.STEP_END, Moment.PEAK)
"""Moments that have series; the step log has all of them."""

IDENTITY_LABELS = ("rank", "gpu_uuid")
"""Labels of every series. `gpu_uuid` is left out, not empty, where the device has no UUID."""


_NO_ALLOCATOR = "on a CPU, which has no caching allocator"
_NOT_TOLD = "where the driver or the operating system does not tell"

UP = Metric(
    name="memtrace_up",
    type=MetricType.GAUGE,
    help="1 while memtrace is at work; 0 once a fault of its own has switched it off, or the run is over.",
)
RUN_STATE = Metric(
    name="memtrace_run_state",
    type=MetricType.GAUGE,
    labels=("run", "run_id", "state"),
    help="The run's state, always 1: running, or how it ended: ok, exception, out_of_memory, signal (SIGTERM, SIGINT).",
)
RUN_START = Metric(
    name="memtrace_run_start_timestamp_seconds",
    type=MetricType.GAUGE,
    unit=Unit.SECONDS,
    help="When memtrace was attached, in seconds since 1970.",
    absent="before that",
)
BUILD_INFO = Metric(
    name="memtrace_build_info",
    type=MetricType.INFO,
    labels=("version",),
    help="Version of memtrace; always 1.",
)
RUN_INFO = Metric(
    name="memtrace_run_info",
    type=MetricType.INFO,
    labels=("run", "run_id", "device", "local_rank", "world_size"),
    help="Which process of which run this is, and of which launch (run_id); always 1.",
)
NOT_SEEN = Metric(
    name="memtrace_not_seen",
    type=MetricType.GAUGE,
    labels=("what",),
    help="1 for each thing of this run that memtrace cannot see; one line of the log says why, and what to do: forward "
    "(the forward pass of the model), step_end (the end of a step), trace (what the allocator does in a step), engine "
    "(what a training engine keeps), device (what lies on further devices of the process).",
    absent="where everything is seen",
)
WORLD_SIZE = Metric(
    name="memtrace_world_size",
    type=MetricType.GAUGE,
    help="Processes that the run has in all.",
)
STEPS = Metric(
    name="memtrace_steps_total",
    type=MetricType.COUNTER,
    help="Training steps since memtrace was attached.",
)
TRACED_STEPS = Metric(
    name="memtrace_traced_steps_total",
    type=MetricType.COUNTER,
    help="Steps whose breakdown was made from allocator events, and is exact.",
)
SELF_SECONDS = Metric(
    name="memtrace_self_seconds_total",
    type=MetricType.COUNTER,
    unit=Unit.SECONDS,
    help="Time that memtrace itself has taken on the training thread.",
)
SLOWED_SECONDS = Metric(
    name="memtrace_slowed_seconds_total",
    type=MetricType.COUNTER,
    unit=Unit.SECONDS,
    help="What traced steps took longer than the steps before them, besides memtrace's own time.",
)
OVERHEAD = Metric(
    name="memtrace_overhead_ratio",
    type=MetricType.GAUGE,
    unit=Unit.RATIO,
    help=glossary.OVERHEAD.meaning,
    absent="before the first step has ended",
)
RETRIES = Metric(
    name="memtrace_allocator_retries_total",
    type=MetricType.COUNTER,
    help="Allocations that succeeded only after the allocator had given its cache back to the device.",
)
OOMS = Metric(
    name="memtrace_ooms_total",
    type=MetricType.COUNTER,
    help="Failed allocations that the run met as an exception; those that torch catches and gets around do not count.",
)
PEAK_RESETS = Metric(
    name="memtrace_allocator_peak_resets_total",
    type=MetricType.COUNTER,
    help="Steps before whose end somebody else had reset the allocator's high-water mark; memtrace never does.",
)
LAST_STEP = Metric(
    name="memtrace_last_step_timestamp_seconds",
    type=MetricType.GAUGE,
    unit=Unit.SECONDS,
    help="When the last step ended, in seconds since 1970.",
    absent="before the first step",
)
LAST_TRACED_STEP = Metric(
    name="memtrace_last_traced_step_timestamp_seconds",
    type=MetricType.GAUGE,
    unit=Unit.SECONDS,
    help="When the last traced step ended, in seconds since 1970: the age of the last exact breakdown.",
    absent="before the first traced step",
)
MEMORY = Metric(
    name="memtrace_memory_bytes",
    type=MetricType.GAUGE,
    unit=Unit.BYTES,
    labels=("category", "component", "dtype", "moment"),
    help=(
        "What memory was for at a moment of the newest step. Between traced steps, what only a trace can see is shown "
        "as of the last one."
    ),
    absent="for what holds no bytes; after a fault",
)
ESTIMATED = Metric(
    name="memtrace_breakdown_estimated",
    type=MetricType.GAUGE,
    labels=("moment",),
    help="1 where the breakdown of that moment comes from counters and earlier traces, 0 where it was traced.",
    absent="for a moment without a breakdown",
)
STEP_PEAK = Metric(
    name="memtrace_step_peak_bytes",
    type=MetricType.GAUGE,
    unit=Unit.BYTES,
    help=glossary.PEAK.meaning,
    absent="before the first traced step; on a GPU before the first step",
)
RUN_PEAK = Metric(
    name="memtrace_run_peak_bytes",
    type=MetricType.GAUGE,
    unit=Unit.BYTES,
    help="The highest memtrace_step_peak_bytes since the run began, whichever steps a scrape has met.",
    absent="as memtrace_step_peak_bytes",
)
STEP_PEAK_ESTIMATED = Metric(
    name="memtrace_step_peak_estimated",
    type=MetricType.GAUGE,
    help="0 where memtrace_step_peak_bytes was traced, or is a high-water mark that rose in the step; else 1.",
    absent="as memtrace_step_peak_bytes",
)
STEP_PEAK_TOKENS = Metric(
    name="memtrace_step_peak_tokens",
    type=MetricType.GAUGE,
    help="Tokens (samples x positions) of the largest micro batch of the step that memtrace_step_peak_bytes is of.",
    absent="as memtrace_step_peak_bytes, and where the model saw no tensor",
)
PREDICTED_PEAK = Metric(
    name="memtrace_predicted_peak_bytes",
    type=MetricType.GAUGE,
    unit=Unit.BYTES,
    help=glossary.FORECAST_PEAK.meaning,
    absent="before the first step with a known peak",
)
PREDICTED_PEAK_BAND = Metric(
    name="memtrace_predicted_peak_band_bytes",
    type=MetricType.GAUGE,
    unit=Unit.BYTES,
    help="Half width of the 95 % band around memtrace_predicted_peak_bytes.",
    absent="as memtrace_predicted_peak_bytes",
)
PREDICTED_TOKENS = Metric(
    name="memtrace_predicted_peak_tokens",
    type=MetricType.GAUGE,
    help="Tokens of that largest micro batch: from max_tokens, the dataset, or the longest one seen.",
    absent="as memtrace_predicted_peak_bytes",
)
CAPACITY = Metric(
    name="memtrace_capacity_bytes",
    type=MetricType.GAUGE,
    unit=Unit.BYTES,
    help=glossary.CAPACITY.meaning,
    absent="as memtrace_headroom_bytes",
)
OOM_RISK = Metric(
    name="memtrace_oom_risk_ratio",
    type=MetricType.GAUGE,
    unit=Unit.RATIO,
    help=glossary.RISK.meaning,
    absent="where the capacity or the predicted peak is not known",
)
GROWTH = Metric(
    name="memtrace_growth_per_step_bytes",
    type=MetricType.GAUGE,
    unit=Unit.BYTES,
    labels=("category",),
    help=glossary.GROWTH.meaning,
    absent="where there is no steady growth",
)
TIME_TO_LIMIT = Metric(
    name="memtrace_time_to_limit_seconds",
    type=MetricType.GAUGE,
    unit=Unit.SECONDS,
    help=glossary.TIME_TO_OOM.meaning,
    absent="where there is no steady growth, or no known capacity",
)
PLAN = Metric(
    name="memtrace_plan_bytes",
    type=MetricType.GAUGE,
    unit=Unit.BYTES,
    labels=("category", "component", "dtype", "moment"),
    help="What the plan of this run expects at the peak, in the labels of memtrace_memory_bytes.",
    absent="without a plan",
)
ALLOCATED = Metric(
    name="memtrace_allocator_allocated_bytes",
    type=MetricType.GAUGE,
    unit=Unit.BYTES,
    help=glossary.ALLOCATED.meaning,
    absent=_NO_ALLOCATOR,
)
ALLOCATOR_PEAK = Metric(
    name="memtrace_allocator_peak_bytes",
    type=MetricType.GAUGE,
    unit=Unit.BYTES,
    help="The allocator's high-water mark: most bytes in use at once since the process began, or since a reset.",
    absent=_NO_ALLOCATOR,
)
RESERVED = Metric(
    name="memtrace_allocator_reserved_bytes",
    type=MetricType.GAUGE,
    unit=Unit.BYTES,
    help=glossary.RESERVED.meaning,
    absent=_NO_ALLOCATOR,
)
SLACK = Metric(
    name="memtrace_allocator_slack_bytes",
    type=MetricType.GAUGE,
    unit=Unit.BYTES,
    help=glossary.SLACK.meaning,
    absent=_NO_ALLOCATOR,
)
PRIVATE_POOL = Metric(
    name="memtrace_allocator_private_pool_bytes",
    type=MetricType.GAUGE,
    unit=Unit.BYTES,
    help=glossary.PRIVATE_POOL.meaning,
    absent="on a CPU, and where torch does not tell",
)
NON_TORCH = Metric(
    name="memtrace_non_torch_bytes",
    type=MetricType.GAUGE,
    unit=Unit.BYTES,
    help=glossary.NON_TORCH.meaning,
    absent="on a CPU, in most containers, and until a reading of the device belongs to one of the allocator's",
)
DEVICE_TOTAL = Metric(
    name="memtrace_device_total_bytes",
    type=MetricType.GAUGE,
    unit=Unit.BYTES,
    help="All memory of the device; on a CPU that of the machine, or the limit of its control group.",
    absent=_NOT_TOLD,
)
DEVICE_USED = Metric(
    name="memtrace_device_used_bytes",
    type=MetricType.GAUGE,
    unit=Unit.BYTES,
    help="Memory of the device that is in use, whoever holds it.",
    absent=_NOT_TOLD,
)
DEVICE_FREE = Metric(
    name="memtrace_device_free_bytes",
    type=MetricType.GAUGE,
    unit=Unit.BYTES,
    help="Memory of the device that nobody holds.",
    absent=_NOT_TOLD,
)
DEVICE_PROCESS = Metric(
    name="memtrace_device_process_bytes",
    type=MetricType.GAUGE,
    unit=Unit.BYTES,
    help="What this process holds on the device; on a CPU its resident set size.",
    absent=_NOT_TOLD,
)
DEVICE_OTHERS = Metric(
    name="memtrace_device_other_processes_bytes",
    type=MetricType.GAUGE,
    unit=Unit.BYTES,
    help="What all other processes hold on the device.",
    absent="on a CPU, and where the driver does not tell",
)
DEVICE_LIMIT = Metric(
    name="memtrace_device_limit_bytes",
    type=MetricType.GAUGE,
    unit=Unit.BYTES,
    help=glossary.DEVICE_LIMIT.meaning,
    absent="where neither is known",
)
HEADROOM = Metric(
    name="memtrace_headroom_bytes",
    type=MetricType.GAUGE,
    unit=Unit.BYTES,
    help=glossary.HEADROOM.meaning,
    absent="where free memory is not known; on a GPU until a reading of the device belongs to one of the allocator's",
)
DEVICE_UTILIZATION = Metric(
    name="memtrace_device_utilization_ratio",
    type=MetricType.GAUGE,
    unit=Unit.RATIO,
    help="Share of time in which a kernel ran, 0 to 1, over the driver's own window.",
    absent="on a CPU, and where the driver does not tell",
)
DEVICE_POWER = Metric(
    name="memtrace_device_power_watts",
    type=MetricType.GAUGE,
    unit=Unit.WATTS,
    help="Power that the device draws.",
    absent="on a CPU, and where the driver does not tell",
)
DEVICE_TEMPERATURE = Metric(
    name="memtrace_device_temperature_celsius",
    type=MetricType.GAUGE,
    unit=Unit.CELSIUS,
    help="Temperature of the device.",
    absent="on a CPU, and where the driver does not tell",
)

CATALOGUE: tuple[Metric, ...] = (
    UP,
    RUN_STATE,
    RUN_START,
    NOT_SEEN,
    BUILD_INFO,
    RUN_INFO,
    WORLD_SIZE,
    STEPS,
    TRACED_STEPS,
    SELF_SECONDS,
    SLOWED_SECONDS,
    OVERHEAD,
    RETRIES,
    OOMS,
    PEAK_RESETS,
    LAST_STEP,
    LAST_TRACED_STEP,
    MEMORY,
    ESTIMATED,
    STEP_PEAK,
    RUN_PEAK,
    STEP_PEAK_ESTIMATED,
    STEP_PEAK_TOKENS,
    PREDICTED_PEAK,
    PREDICTED_PEAK_BAND,
    PREDICTED_TOKENS,
    CAPACITY,
    OOM_RISK,
    GROWTH,
    TIME_TO_LIMIT,
    PLAN,
    ALLOCATED,
    ALLOCATOR_PEAK,
    RESERVED,
    SLACK,
    PRIVATE_POOL,
    NON_TORCH,
    DEVICE_TOTAL,
    DEVICE_USED,
    DEVICE_FREE,
    DEVICE_PROCESS,
    DEVICE_OTHERS,
    DEVICE_LIMIT,
    HEADROOM,
    DEVICE_UTILIZATION,
    DEVICE_POWER,
    DEVICE_TEMPERATURE,
)
"""All metrics, in the order in which they are exposed."""
