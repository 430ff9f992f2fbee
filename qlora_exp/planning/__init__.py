"""Predict what a run needs before it starts: memory by phase, time per step, and whether it fits a device.

May import: utils, libraries, config, environment, data (counting rows), models, tracking (run keys and files).
Never here: reading past runs. Callers pass the runs that a calibration is fitted to.
"""
