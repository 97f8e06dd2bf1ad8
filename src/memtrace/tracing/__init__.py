"""The one stateful joint: from a training loop's calls to records.

In come a model, its optimizers, and the hooks' calls. Out go one StepRecord a step and the newest snapshot. Must not
know who reads them. Another form of loop goes into `entries`, `cycle` or `updates`, another reason to trace a step
into `schedule`.
"""
