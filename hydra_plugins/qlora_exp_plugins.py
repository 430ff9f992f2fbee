"""Define the sweepers and launchers of `qlora_exp.sweeps` where Hydra searches for plugins.

Hydra 1.3 accepts only classes that are defined below `hydra_plugins`, so re-exports do not work.
"""

from qlora_exp.sweeps import hydra_launchers, hydra_sweepers, tuned_sweeper


class GridSweeper(hydra_sweepers.GridSweeper):
    """The sweeper `hydra/sweeper=grid`."""


class OptunaSweeper(hydra_sweepers.OptunaSweeper):
    """The sweeper `hydra/sweeper=optuna`."""


class TunedSweeper(tuned_sweeper.TunedSweeper):
    """The sweeper `hydra/sweeper=tuned`."""


class LocalLauncher(hydra_launchers.LocalLauncher):
    """The launcher `hydra/launcher=local`."""


class RayLauncher(hydra_launchers.RayLauncher):
    """The launcher `hydra/launcher=ray`."""


class SubmititLauncher(hydra_launchers.SubmititLauncher):
    """The launcher `hydra/launcher=slurm`."""
