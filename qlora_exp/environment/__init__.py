"""The environment of a run: device, hub, files of rows, memory, speed and energy, versions of code and libraries.

May import: utils, libraries, config.
Never here: models, what rows contain, MLflow.
"""
