"""Memory before the run: recipes, formulas, simulation, the allocator and the devices."""
