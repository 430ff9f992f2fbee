"""A trained model, taken away: loaded, merged, exported, served, registered.

May import: every room above but sweeps.
Never here: training.
"""
