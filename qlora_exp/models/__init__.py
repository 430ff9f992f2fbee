"""Base models and adapters: loading, quantization, adapter methods, and how LoRA is initialized.

May import: utils, libraries, config, environment, data.
Not allowed here: trainers, MLflow, complete runs.
"""
