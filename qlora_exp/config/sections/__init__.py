"""Sections of the config, one file per folder of conf/: every key with its type, default and meaning.

May import: utils, and of `config.tables` what libraries declare.
Never here: checks across sections; they are in `config.crosschecks`.
"""
