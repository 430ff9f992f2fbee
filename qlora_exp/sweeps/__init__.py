"""Many runs: what Hydra calls, jobs and what became of them, searches, launchers.

May import: every room above but deploy.
Never here: how a run trains; a job calls the recipe.
"""
