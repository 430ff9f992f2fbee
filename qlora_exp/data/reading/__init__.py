"""Reading: rows from where they lie (files, the hub, generators), and what their columns are recognized as.

May import: utils, config, environment, and the dialogues, values and scores of `data`.
Never here: cleaning rows, splitting them, tokens.
"""
