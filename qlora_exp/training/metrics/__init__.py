"""Metric modules for `evaluate.load(path)`: the `evaluate` package ships none, and the hub may be out of reach."""
