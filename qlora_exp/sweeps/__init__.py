"""Many runs: the sweepers and launchers that Hydra calls, jobs and their outcomes, searches.

May import: every room listed before it in the README but deploy.
Never here: how a run trains; a job calls `recipe`.
"""
