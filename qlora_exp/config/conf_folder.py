"""Find the folder with the shipped option files. Imports nothing that takes time: shell completion uses it."""

from pathlib import Path

from qlora_exp.utils.errors import ConfigError

GROUPS = (
    "model", "method", "quantization", "lora_variant", "optimizer", "dataset", "training", "distributed", "evaluation",
    "unrelated", "tracking", "experiment", "sweep",
)  # fmt: skip
"""The shipped config groups."""


def conf_dir() -> Path:
    """Return the folder of the shipped config groups: next to the package in a checkout, inside it in a wheel.

    Raises:
        ConfigError: there is no such folder.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise ConfigError(f"no conf/config.yaml next to or inside {package}: the installation is incomplete")
