"""The environment of a run: device, hub, memory, speed and energy, versions of code and libraries.

May import: utils, libraries, config.
Never here: models, rows, MLflow.
"""
