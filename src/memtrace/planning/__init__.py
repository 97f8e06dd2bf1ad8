"""Memory before the run: formulas and simulated steps, held against devices, and what would change them.

In come a parameter count or a configuration, a recipe, an optimizer, who shares what. Out comes a plan in the words of
a measured step. Must not know a live run. A new recipe goes into `recipe`, a device into `hardware`, a remedy into
`remedies` and `simulated_remedies`.
"""
