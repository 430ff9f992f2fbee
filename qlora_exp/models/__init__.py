"""Base models and what is added to them: loading, quantization, adapters, how LoRA starts.

May import: utils, libraries, config, environment, data.
Never here: trainers, MLflow, whole runs.
"""
