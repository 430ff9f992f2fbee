"""Read environment variables from a `.env` file."""

from dotenv import load_dotenv

from qlora_exp.utils.errors import ConfigError


def load_env_file() -> None:
    """Set environment variables from `.env` in the working directory. Variables that are already set stay.

    Raises:
        ConfigError: the file cannot be read, or has a value that an environment variable cannot have.
    """
    try:
        load_dotenv(".env")
    except (OSError, ValueError) as error:
        raise ConfigError(f".env: cannot be read: {error}") from error
