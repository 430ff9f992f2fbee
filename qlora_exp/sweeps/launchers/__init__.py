"""Start jobs as processes: on this machine, on Ray, on SLURM.

May import: sweeps and what it may import.
Never here: the choice of jobs.
"""
