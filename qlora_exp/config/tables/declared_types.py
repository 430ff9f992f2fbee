"""Check settings by the types that libraries declare, and read these types from the JSON files of this folder.

The files are written by `nox -s library-settings` from the annotations of the installed libraries, so that a config is
checked without importing them.
"""

from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Annotated, Any, Literal, Union

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from qlora_exp.utils.errors import did_you_mean

PLAIN: dict[str, Any] = {
    "any": Any,
    "bool": bool,
    "dict": dict,
    "float": float,
    "int": int,
    "null": type(None),
    "str": str,
}
"""Names of the simple types in the files."""


def python_type(described: Any) -> Any:
    """Return the Python type that a description in a file stands for.

    Raises:
        ValueError: the description has none of the forms below.
    """
    match described:
        case str() if described in PLAIN:
            return PLAIN[described]
        case {"list": kind}:
            return list[python_type(kind)]  # type: ignore[misc]
        case {"tuple": kinds}:
            # YAML and the command line have lists only.
            return Annotated[tuple[*map(python_type, kinds)], Field(strict=False)]  # type: ignore[misc]
        case {"dict": [key, value]}:
            return dict[python_type(key), python_type(value)]  # type: ignore[misc]
        case {"literal": values}:
            return Literal[*values]
        case {"union": kinds}:
            return Union[*map(python_type, kinds)]
    raise ValueError(f"no such type: {described}")


def validator(kind: Any) -> TypeAdapter[Any]:
    """Return a strict validator: no text for a number, no infinite number."""
    return TypeAdapter(kind, config=ConfigDict(strict=True, allow_inf_nan=False))


def misfit(accepts: TypeAdapter[Any], value: Any) -> str | None:
    """Return why a value is not what a validator accepts; None if it is."""
    try:
        accepts.validate_python(value)
    except ValidationError as error:
        reasons = dict.fromkeys(problem["msg"] for problem in error.errors()[:3])
        return f"{'; or '.join(reasons)}; got {value!r}"
    return None


def problems(where: str, owner: str, allowed: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[str]:
    """Yield a message for each setting that its owner does not have, or whose value does not fit.

    Args:
        where: key of the config with the settings, such as `optim_args`.
        owner: what the settings are of, as the config names it: `optim=sgd`.
        allowed: type of each setting that it has.
        given: the settings and their values.
    """
    for name, value in given.items():
        if name not in allowed:
            yield (
                f"{where}.{name}: {owner} has no such setting{did_you_mean(name, allowed)} "
                f"Its settings: {', '.join(allowed) or 'none'}"
            )
        elif why := misfit(validator(allowed[name]), value):
            yield f"{where}.{name}: {why}"


def other_version(made_for: dict[str, str]) -> str:
    """Return a note for error messages if a library is installed in another version than the file's; it may have more.

    Args:
        made_for: name and version of each library that the file was made from.
    """
    notes = [
        f"settings are those of {name.upper() if name in ('peft', 'trl') else name} {made}; installed is {installed}"
        for name, made in made_for.items()
        if (installed := version(name)) != made
    ]
    return f" ({'; '.join(notes)}: `nox -s library-settings` updates them)" if notes else ""
