"""What the installed libraries take, and what of it works: tables, most of them JSON written by `nox -s`, and checks.

May import: utils.
Never here: the libraries themselves, whose import takes seconds.
"""
