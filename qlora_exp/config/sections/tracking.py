"""Section `tracking`: where MLflow stores runs, and what is logged there."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from qlora_exp.config.sections.base import Section
from qlora_exp.utils.secrets import HOW_TO_GIVE, secret_in_uri


class TrackingConfig(Section):
    """Where MLflow stores runs, and what is logged there."""

    uri: Annotated[str, Field(min_length=1)] | None = None
    """MLflow tracking URI. null: the environment variable MLFLOW_TRACKING_URI, else SQLite under ./mlruns."""
    experiment_name: str | None = None
    """MLflow experiment that the run belongs to. null: MLFLOW_EXPERIMENT_NAME, else qlora_exp."""
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
        if self.uri and (secret := secret_in_uri(self.uri)):
            raise ValueError(f"uri: {secret} in it would be written to files; {HOW_TO_GIVE}")
        return self
