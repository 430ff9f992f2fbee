"""What the installed libraries take, and what of it works, as JSON written by `nox -s`, and the checks against it.

May import: utils.
Never here: the libraries themselves, whose import takes seconds.
"""
