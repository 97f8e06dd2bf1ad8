"""One rank's view of DDP, FSDP and DeepSpeed's ZeRO: which share it holds, and which buffers it allocates, and when.

In come a model's parameters and the strategy. Out go shares, and updates that allocate as the engine does. Must not
know devices or verdicts. A new engine is a file with its updates, a strategy of `shares`, and its assumptions.
"""
