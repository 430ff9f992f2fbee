"""Sections of the config, one file per folder of conf/: every key with its type, default and meaning.

May import: utils, and `config.tables.peft_methods`.
Never here: checks across sections; they are in `config.crosschecks`.
"""
