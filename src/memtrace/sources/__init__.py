"""Where live facts come from: the only code that asks torch's allocators, the driver or the operating system.

In comes a device, or a model to put hooks on. Out go events, readings and calls: what happened, and when. Must not
know what a storage is for. A new device goes into `event_source` and `devices`, a private name of torch into the
modules named `torch_private`, a hook into `hooks`.
"""
