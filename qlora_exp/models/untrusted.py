"""Read the files of a model, an adapter or a tokenizer that somebody else made.

Whatever they contain ends in a model or in one `ModelError` that names the file: libraries raise errors of any kind
about damaged files, build whatever size a config names, and open pickles and files that an index names elsewhere.
"""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch.nn.modules import module as torch_module
from transformers.integrations.gguf.reader import read_gguf_metadata

from qlora_exp.libraries.torch import without_pickles
from qlora_exp.models.files import NO_PICKLE, check_counts, read_json
from qlora_exp.utils.errors import ModelError, UserError, is_out_of_memory, type_and_first_line

_OTHER_PLACES = re.compile(r"(?!special_tokens_map_)\w*_files?")
"""Keys of tokenizer_config.json that name files; transformers does not read special_tokens_map_file."""
_MOST_MODULES = 200_000
_BUFFERS = 1 << 32
"""Bytes that a model may take for tables that its files do not have, such as masks and positions."""


def check_folder(folder: Path) -> None:
    """Check the JSON files and the GGUF files of a model before a library reads them.

    Raises:
        ModelError: a file is damaged, or is an index of weights in other places.
    """
    for name in ("config.json", "generation_config.json", "adapter_config.json", "tokenizer_config.json"):
        values = read_json(folder / name)
        for key, value in values.items() if name == "tokenizer_config.json" else ():
            if _OTHER_PLACES.fullmatch(key) and ("/" in str(value) or "\\" in str(value)):
                raise ModelError(f"{folder / name}: {key} names {value!r:.80}, which is no file of this folder")
    for file in folder.glob("*.index.json"):
        weights = read_json(file).get("weight_map")
        if not isinstance(weights, dict) or not weights:
            raise ModelError(f"{file} is damaged: weight_map must be a JSON object")
        for shard in weights.values():
            # No part of it may be a folder, and no pickle.
            if not isinstance(shard, str) or not re.fullmatch(r"[\w.-]+\.safetensors", shard):
                raise ModelError(
                    f"{file}: weight_map names {shard!r:.80}, which is no .safetensors file of this folder"
                )
    for file in folder.glob("*.gguf"):
        with explained(str(file)):
            metadata, _ = read_gguf_metadata(str(file))
        check_counts(file, metadata)


@contextmanager
def explained(what: str, pickles: bool = False) -> Iterator[None]:
    """Raise whatever a library raises about damaged files inside as a `ModelError` about `what`.

    Errors of this program, a full disk and memory that ran out stay as they are. No pickle is opened inside, unless
    `pickles` is true; transformers then reads weights from it and nothing else (`weights_only`).
    """

    pickle = ModelError(f"{what}: {NO_PICKLE}")
    try:
        with nullcontext() if pickles else without_pickles(pickle):
            yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # the panic of a Rust library is no Exception
        if is_out_of_memory(error) or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EACCES)):
            raise
        raise ModelError(f"{what}: cannot be loaded, a file may be damaged: {type_and_first_line(error)}") from error


@contextmanager
def bounded(what: str, most: int) -> Iterator[None]:
    """Let a library build modules inside with at most `most` values in their parameters.

    A config may name any size, and values that no file has would be made up. Models are built without values first,
    so that this is known before they take memory.

    Raises:
        ModelError: there are more values, or more modules or larger tables than any model has.
    """
    counts = {"modules": 0, "values": 0, "bytes of tables": 0}
    limits = {"modules": _MOST_MODULES, "values": most, "bytes of tables": _BUFFERS}

    def add(kind: str, count: int) -> None:
        counts[kind] += count
        if counts[kind] > limits[kind]:
            raise ModelError(
                f"{what}: its config describes a model with more than {limits[kind]:,} {kind}, which its files have not"
            )

    def parameter(_module: Any, _name: str, value: Any) -> None:
        add("values", 0 if value is None else value.numel())

    def buffer(_module: Any, _name: str, value: Any) -> None:
        add("bytes of tables", 0 if value is None else value.nbytes)

    hooks = (
        torch_module.register_module_module_registration_hook(lambda *_: add("modules", 1)),
        torch_module.register_module_parameter_registration_hook(parameter),
        torch_module.register_module_buffer_registration_hook(buffer),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def most_values(folder: Path) -> int:
    """Return the largest number of values that a model with these weights files can have.

    The smallest formats store a value in less than two bits; tied weights are stored once, but built several times.
    """
    files = (file for kind in ("*.safetensors", "*.gguf") for file in folder.glob(kind))
    return 1024 + 16 * sum(file.stat().st_size for file in files)
