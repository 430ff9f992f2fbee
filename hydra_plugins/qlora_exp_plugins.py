"""What Hydra finds by itself: our sweepers and launchers, which are in `qlora_exp.sweeps`."""

from qlora_exp.sweeps.hydra_launchers import LocalLauncher, RayLauncher, SubmititLauncher
from qlora_exp.sweeps.hydra_sweepers import GridSweeper, OptunaSweeper

__all__ = ["GridSweeper", "LocalLauncher", "OptunaSweeper", "RayLauncher", "SubmititLauncher"]
