"""Load, merge, export, serve and register trained models.

May import: every room listed before it in the README but sweeps.
Never here: training.
"""
