"""Private parts of other libraries that this package uses: one module for each library, one name for each touch.

May import: utils.
Never here: what has a public way, and anything about runs; no other room names a library's private parts.
"""
