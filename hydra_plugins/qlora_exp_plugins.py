"""The sweepers and launchers of `qlora_exp.sweeps`, under the names by which Hydra finds them.

Hydra 1.3 takes only classes that are defined below `hydra_plugins`, so plain re-exports are refused.
"""

from qlora_exp.sweeps import hydra_launchers, hydra_sweepers


class GridSweeper(hydra_sweepers.GridSweeper):
    """`hydra/sweeper=grid`."""


class OptunaSweeper(hydra_sweepers.OptunaSweeper):
    """`hydra/sweeper=optuna`."""


class LocalLauncher(hydra_launchers.LocalLauncher):
    """`hydra/launcher=local`."""


class RayLauncher(hydra_launchers.RayLauncher):
    """`hydra/launcher=ray`."""


class SubmititLauncher(hydra_launchers.SubmititLauncher):
    """`hydra/launcher=slurm`."""
