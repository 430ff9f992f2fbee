"""Wrap the private parts of other libraries that this package uses: one module per library, one name per use.

May import: utils.
Never here: code about runs, and uses that have a public alternative. (All are in docs/reference/library_patches.md.)
"""
