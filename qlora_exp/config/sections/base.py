"""Base classes of the config sections, and the types that sections share."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Dtype = Literal["float32", "bfloat16", "float16"]
NonNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(gt=0, lt=1)]
Interval = Literal["no", "steps", "epoch"]


class Section(BaseModel):
    """One section of the config. Unknown keys are rejected; attribute docstrings document the keys."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )


class PeftSettings(Section):
    """Section that also accepts the settings of a PEFT config."""

    model_config = ConfigDict(extra="allow")

    @property
    def settings(self) -> dict[str, Any]:
        """PEFT settings: every key that this class does not declare."""
        return dict(self.model_extra or {})
