"""What updates a model and what that keeps: torch's optimizers, whatever wraps them, their states and master weights.

In come optimizers as they are, of any library, and the model's parameters. Out go those whose steps are counted, and
claims. Must not know when a step ends. What a new optimizer keeps elsewhere than in `state` goes into `claims`.
"""
