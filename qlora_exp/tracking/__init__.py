"""What a run writes down: its journal on disk, MLflow, and the key that identifies it.

May import: utils, libraries, config, environment.
Never here: training; tracking and training do not know each other.
"""
