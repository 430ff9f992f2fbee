"""Load, merge, export, serve and register trained models.

May import: every room above but sweeps.
Never here: training.
"""
