"""The plugin of ms-swift: `swift sft --external_plugins memtrace_for_swift.py --callbacks memtrace ...`."""

from swift.callbacks import callbacks_map

from memtrace import MemTraceCallback

callbacks_map["memtrace"] = lambda *_: MemTraceCallback()
