"""What a user can set, described: for `keys`, the reference, the JSON schema and shell completion.

May import: all else of the config room.
Never here: checks; a description that a check needs belongs to that check.
"""
