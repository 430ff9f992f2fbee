"""The command line: one file for each family of commands, with parsers and handlers side by side.

`main` lists the families. A handler's docstring is the text of its `--help`, and its first line is the entry in
`qlora-exp --help`.

May import: every room above, but heavy libraries only inside handlers.
Never here: what a Python user would call; handlers parse, call and print.
"""
