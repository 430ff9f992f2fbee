"""Training and what is measured around it: the trainer, optimizers, checkpoints, evaluation.

May import: utils, libraries, config, environment, data, models.
Never here: MLflow; curves leave through a function that the caller gives.
"""
