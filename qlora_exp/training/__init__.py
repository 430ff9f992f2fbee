"""Train models and measure them: trainer, optimizers, checkpoints, evaluation.

May import: utils, libraries, config, environment, data, models.
Never here: MLflow; curves are passed to a function of the caller.
"""
