"""Record runs: the journal on disk, the MLflow run, and the run key.

May import: utils, libraries, config, environment.
Never here: training; neither of tracking and training imports the other.
"""
