"""What optimizers keep for each parameter, and how a simulated step runs them.

In comes the name of an optimizer, of torch or as Trainer spells it. Out go its states by component and type, and a
class to step. Must not know models. A new optimizer is a row of `layouts`, and of `simulated` or `trainer` where its
step can be run.
"""
