"""What a run will need before it runs: memory by phase, time of a step, what fits a device.

May import: utils, libraries, config, environment, models, tracking (keys and files).
Never here: past runs; what it learns from them is given to it.
"""
