"""Base classes of the config sections, and the types that sections share."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Dtype = Literal["float32", "bfloat16", "float16"]
NonNegative = Annotated[int, Field(ge=0)]
PluginName = Annotated[str, Field(pattern=r"^\w[\w.-]*$", max_length=100)]
"""Name of a metric or a loss: built in, or of an installed package."""
Share = Annotated[float, Field(gt=0, lt=1)]
Interval = Literal["no", "steps", "epoch"]

_LONGEST_LOCATION, _LONGEST_NAME = 1000, 255


def check_location(value: str | None) -> str | None:
    """Check a key that names a local file or folder, or something on the hub.

    Raises:
        ValueError: it can be neither.
    """
    if value is None:
        return None
    if "://" in value:
        raise ValueError("is a URL; download it first, and name the local file or folder")
    if "\0" in value or len(value) > _LONGEST_LOCATION or any(len(part) > _LONGEST_NAME for part in value.split("/")):
        raise ValueError("can be neither a path nor a name on the hub")
    try:
        if value.startswith("~"):
            Path(value).expanduser()
    except RuntimeError as error:
        raise ValueError("begins with the home folder of a user whom this machine does not know") from error
    return value


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
