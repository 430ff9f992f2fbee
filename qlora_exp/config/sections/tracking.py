"""Section `tracking`: where MLflow stores runs, and what is logged there."""

from typing import Annotated, Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from qlora_exp.config.sections.base import Section


class TrackingConfig(Section):
    """Where MLflow stores runs, and what is logged there."""

    uri: Annotated[str, Field(min_length=1)] | None = None
    """MLflow tracking URI. null: SQLite under ./mlruns."""
    experiment_name: str = "qlora_exp"
    """MLflow experiment that the run belongs to."""
    run_name: str | None = None
    """Name of the MLflow run. null: made of model, dataset, method, quantization, variant, rank and seed."""
    tags: dict[str, str] = {}
    """Additional tags of the MLflow run."""
    log_adapter: bool = True
    """Log the trained adapter to MLflow as a model."""
    log_full_model: bool = False
    """Log a fully fine-tuned model to MLflow. It is as large as the base model."""
    plan: bool = True
    """Predict the run's memory before training and log it with the measured memory. Takes seconds, once for all runs
    that need the same prediction."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.uri and urlsplit(self.uri).password:
            raise ValueError(
                "uri: a password in it would be written to files; instead set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD (or PGPASSWORD for a database) in the environment or in .env"
            )
        return self
