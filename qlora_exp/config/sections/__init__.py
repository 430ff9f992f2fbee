"""The sections of the config, one file for each folder of conf/: every key with its type, default and meaning.

May import: utils, and the PEFT settings of config.
Never here: checks across sections, which are in config/crosschecks.
"""
