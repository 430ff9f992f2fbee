"""The interactive page of a comparison, and how its rows look and are named in every figure.

May import: utils, and the modules of results that compute: compare, record, row.
Never here: statistics; pictures in files, which are in `results.plots`.
"""
