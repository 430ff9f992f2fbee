"""Training and held-out rows: sources, prompts, tokens, the audit of labels, and leaks between the two.

May import: utils, libraries, config, environment.
Never here: models and training.
"""
