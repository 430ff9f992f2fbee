"""General helpers, independent of experiments: errors, files, tables, signals, worker processes, secrets.

May import: nothing of this package.
Never here: torch, transformers or MLflow at import time, and anything that depends on what a run is.
"""
