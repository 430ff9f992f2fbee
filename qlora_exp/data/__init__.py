"""Rows: where they come from, how they become tokens, what the labels teach, and what leaks.

May import: utils, libraries, config, environment.
Never here: models and training.
"""
