"""Past runs: read, compare, report, reproduce and bundle them.

May import: every room listed before it in the README.
Never here: the internals of training; runs are read from the files and MLflow entries that they wrote.
"""
