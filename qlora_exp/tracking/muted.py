"""Log nothing: the tracker of a process whose run another process tracks."""

from pathlib import Path
from typing import Any

from qlora_exp.tracking.tracker import Tracker


class MutedTracker(Tracker):
    """Tracker that neither writes nor sends anything. The run's main process has the same values, and logs them."""

    def __init__(self, output_dir: Path, resumed: bool) -> None:
        self.output_dir, self.resumed = output_dir, resumed
        self._params: dict[str, str] = {}
        self._logged: dict[tuple[int, str], float] = {}
        self._summary: dict[str, float] = {}

    @property
    def run_id(self) -> None:
        """None: the main process knows it."""

    def check(self) -> None:
        """Do nothing: the main process checks the output folder."""

    def deliver_now(self) -> None:
        """Do nothing."""

    def _send(self, **_: Any) -> None:
        pass

    def _write(self, text: str, name: str) -> None:
        pass
