"""How jobs become processes: on this machine, on Ray, on SLURM.

May import: sweeps and what it may import.
Never here: which jobs there are.
"""
