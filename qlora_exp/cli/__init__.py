"""The command line: one file for each family of commands, with its parsers and handlers.

`main` lists the families. A handler's docstring is the text of its `--help`, and its first line is the entry in
`qlora-exp --help`.

May import: every room listed before it in the README, but imports of heavy libraries only inside handlers.
Never here: functions that a Python user would call; handlers only read options, call the other rooms and print.
"""
