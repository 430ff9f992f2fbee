"""What a config may say: the schema, its checks, how Hydra composes it, and how somebody else's config is read.

May import: utils, libraries.
Never here: torch or anything that imports it; a wrong config is refused within a second.
"""
