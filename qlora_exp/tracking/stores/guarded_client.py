"""Upload artifacts with MLflow's client, after checking where a record says that they go."""

from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from qlora_exp.tracking.stores import artifacts


class GuardedClient(MlflowClient):
    """A client that writes artifacts only where the store may have them; else it raises `TrackingError`."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._places: dict[str, str] = {}

    def log_artifact(self, run_id: str, local_path: str, artifact_path: str | None = None) -> None:
        """Upload a file to a run."""
        self._check(self._place(run_id), local_path, artifact_path)
        super().log_artifact(run_id, local_path, artifact_path)

    def log_artifacts(self, run_id: str, local_dir: str, artifact_path: str | None = None) -> None:
        """Upload the files of a folder to a run."""
        self._check(self._place(run_id), local_dir, artifact_path)
        super().log_artifacts(run_id, local_dir, artifact_path)

    def log_model_artifact(self, model_id: str, local_path: str, artifact_path: str | None = None) -> None:
        """Upload a file to a logged model."""
        self._check(self.get_logged_model(model_id).artifact_location, local_path, artifact_path)
        super().log_model_artifact(model_id, local_path, artifact_path)

    def log_model_artifacts(self, model_id: str, local_dir: str, artifact_path: str | None = None) -> None:
        """Upload the files of a folder to a logged model."""
        self._check(self.get_logged_model(model_id).artifact_location, local_dir, artifact_path)
        super().log_model_artifacts(model_id, local_dir, artifact_path)

    def _place(self, run_id: str) -> str:
        """Return where a run's artifacts go; asked once, as MLflow's own client does."""
        if run_id not in self._places:
            self._places[run_id] = self.get_run(run_id).info.artifact_uri
        return self._places[run_id]

    def _check(self, place: str, local: str, artifact_path: str | None) -> None:
        source = Path(local)
        files = source.rglob("*") if source.is_dir() else [source]
        for file in files:  # a link in the store could lead out of it
            name = file.relative_to(source if source.is_dir() else source.parent)
            artifacts.require_own(place, self.tracking_uri, str(Path(artifact_path or "", name)))
