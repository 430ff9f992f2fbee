"""Sharding: a model divided over the processes of a run, by FSDP2 or DeepSpeed's ZeRO-3.

May import: utils, libraries, environment.
Never here: starting processes, which is `recipe.launch`.
"""
