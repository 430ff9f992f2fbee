"""The section `tracking`: where MLflow is and what goes there."""

from typing import Annotated, Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from qlora_exp.config.sections.base import Section


class TrackingConfig(Section):
    """Where MLflow is and what goes there."""

    uri: Annotated[str, Field(min_length=1)] | None = None
    """null: SQLite under ./mlruns; else any MLflow tracking URI."""
    experiment_name: str = "qlora_exp"
    run_name: str | None = None
    """null: made of model, dataset, method, quantization, variant, rank and seed."""
    tags: dict[str, str] = {}
    log_adapter: bool = True
    """Keep the trained adapter in MLflow as a logged model."""
    log_full_model: bool = False
    """The same for a full fine-tune, which is as large as the base model."""
    plan: bool = True
    """Plan the run's memory before it begins (seconds, once for runs alike), to be logged beside what it takes."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.uri and urlsplit(self.uri).password:
            raise ValueError(
                "uri: a password there would be kept in files; set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD (or PGPASSWORD for a database) in the environment or in .env"
            )
        return self
