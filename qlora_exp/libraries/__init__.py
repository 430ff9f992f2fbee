"""Wrap the private parts of other libraries that this package uses: one module per library, one name per use.

May import: utils.
Not allowed here: uses that have a public alternative, and code about runs. No other room uses private parts, except
where docs/library_patches.md says so.
"""
