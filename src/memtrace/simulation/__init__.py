"""A model's own code on tensors without memory: a training step that needs neither the device nor its memory.

In come a configuration and a batch's shape. Out go the events that a device of a given kind would have had. Must not
know recipes, engines or verdicts. A kernel that allocates other than torch's fake kernels say goes into `kernels`, a
call that differs on a device into `cuda_functions`.
"""
