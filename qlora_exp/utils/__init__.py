"""Small tools that know nothing of experiments: errors, files, tables, signals, worker processes, secrets.

May import: nothing of this package.
Never here: torch, transformers or MLflow, and anything that knows what a run is.
"""
