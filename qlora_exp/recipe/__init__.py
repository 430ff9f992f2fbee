"""One run from start to end, as a list of stages; each stage is a function in a file of its own.

May import: every room listed before it in the README.
Never here: sweeps, comparisons, exports; of other runs only what one saved is read (`saved`), to train on from it.
"""
