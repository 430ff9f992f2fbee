"""Past runs: read, compared, reported, repeated and bundled.

May import: every room above.
Never here: training's internals; runs are read from what they left behind.
"""
