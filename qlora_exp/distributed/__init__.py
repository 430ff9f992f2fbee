"""Several processes that share one run: how they start, exchange values, and end together.

May import: utils, libraries, config, environment.
Never here: what a run computes; models, rows, MLflow.
"""
