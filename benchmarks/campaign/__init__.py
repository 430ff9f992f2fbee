"""The parts of the fault campaign, `faults.py`."""
