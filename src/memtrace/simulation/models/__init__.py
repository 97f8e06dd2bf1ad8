"""Models and batches from configurations, without weights, and what a training makes of them before its first step.

In comes a configuration of transformers. Out go a model on the meta device and its batch. Must not know recipes. A
new kind of batch goes into `builds`, a new form of quantised layers into `quantized`.
"""
