"""What would change a plan: remedies, each planned again, and the largest batch or sequence that fits.

In comes a request for a plan. Out go plans, ranked by the bytes that they save. Must not know how a plan is made. A
remedy by formula goes into `remedies`, one that is simulated into `simulated_remedies`.
"""
