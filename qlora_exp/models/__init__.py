"""Base models and adapters: loading, quantization, adapter methods, and how LoRA is initialized.

May import: utils, libraries, config, environment, data.
Never here: trainers, MLflow, complete runs.
"""
