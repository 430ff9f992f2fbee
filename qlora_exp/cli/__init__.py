"""The command line: one file for each family of commands, with parsers and handlers side by side.

May import: every room above.
Never here: what a Python user would call; handlers parse, call and print.
"""
