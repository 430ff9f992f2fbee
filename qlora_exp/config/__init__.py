"""Config: the schema, its checks, composing with Hydra, and reading an untrusted config.

May import: utils, libraries.
Never here: torch or anything that imports it, so that a wrong config is rejected within a second.
"""
