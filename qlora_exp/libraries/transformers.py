"""Wrap transformers' private parts. Checked on transformers 5.23.0."""

import runpy
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qlora_exp.libraries.patching import patched


def model_types() -> set[str]:
    """Return the types of models (`model_type` in config.json) that the installed transformers knows.

    The public `CONFIG_MAPPING` imports torch. The generated file that is read here has all types but a few, of which
    those that generate text have a folder of their name.
    """
    package = find_spec("transformers")
    assert package is not None
    assert package.origin is not None
    models = Path(package.origin).parent / "models"
    named = runpy.run_path(str(models / "auto" / "auto_mappings.py"))["CONFIG_MAPPING_NAMES"]
    return {*named, *(file.name.replace("_", "-") for file in models.iterdir() if (file / "__init__.py").is_file())}


def with_bitsandbytes_layers(model: Any, settings: Any) -> None:
    """Replace the same linear layers by bitsandbytes layers as loading with `settings` would.

    `replace_with_bnb_linear` and `get_keys_to_not_convert` are undocumented helpers of `from_pretrained`, which cannot
    replace them: it needs weights.
    """
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    replace_with_bnb_linear(model, get_keys_to_not_convert(model), settings)


def experts_without_values(product: Callable[[Any, Any], Any]) -> AbstractContextManager[None]:
    """Let fused experts multiply tensors without values within the context, in any dtype.

    torch takes only bfloat16 in grouped products of such tensors, as on GPUs. Replaces `integrations.moe._grouped_mm`.

    Args:
        product: returns the product of tokens with the first of several experts, which has the same sizes.
    """
    from transformers.integrations import moe

    return patched(moe, _grouped_mm=lambda input, weight, offs: product(input.to(weight.dtype), weight))


def rows_without_values() -> AbstractContextManager[None]:
    """Let rows of tensors without values be single ones within the context, as an unpadded row is.

    Whether rows are packed stands in their positions. Without values transformers assumes it, and makes a mask as large
    as the square of the row. Replaces `masking_utils.find_packed_sequence_indices`, which it calls only where no mask
    of padding is given.
    """
    from transformers import masking_utils

    return patched(masking_utils, find_packed_sequence_indices=lambda position_ids: None)


def quantized_on(device: str) -> AbstractContextManager[None]:
    """Let `from_pretrained` quantize to 4 bits on this device what it loads on the CPU, one matrix at a time.

    `Bnb4bitQuantize.convert` quantizes where a weight is loaded. A CPU takes minutes for what a GPU does in seconds.
    """
    from transformers.integrations.bitsandbytes import Bnb4bitQuantize

    original = Bnb4bitQuantize.convert

    def convert(self: Any, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        moved = {
            name: (value[0] if isinstance(value, list) else value).to(device) for name, value in input_dict.items()
        }
        return {name: value.to("cpu") for name, value in original(self, moved, *args, **kwargs).items()}

    return patched(Bnb4bitQuantize, convert=convert)


@contextmanager
def parameters_packed(names: Callable[[Any], Collection[str]], pack: Callable[[Any], Any]) -> Iterator[None]:
    """Let `from_pretrained` with bitsandbytes in 4 bits pack other parameters than linear layers' too, in the context.

    Each is packed as soon as it is read, like a layer's weight. Replaces `Bnb4BitHfQuantizer.param_needs_quantization`,
    by which transformers plans memory too, and `Bnb4bitQuantize.convert`.

    Args:
        names: returns the full names of these parameters of a model.
        pack: returns the parameter to store for a tensor of the model's dtype.
    """
    from transformers.integrations.bitsandbytes import Bnb4bitQuantize
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    needed, original, chosen = Bnb4BitHfQuantizer.param_needs_quantization, Bnb4bitQuantize.convert, cache(names)

    def needs(self: Any, model: Any, param_name: str, **kwargs: Any) -> bool:
        if param_name in chosen(model):
            return not self.pre_quantized  # files of 4-bit layers have such parameters as they were
        return needed(self, model, param_name, **kwargs)

    def convert(self: Any, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        if input_dict.keys() - chosen(kwargs["model"]):
            return original(self, input_dict, *args, **kwargs)
        return {name: pack(value[0] if isinstance(value, list) else value) for name, value in input_dict.items()}

    quantizer = patched(Bnb4BitHfQuantizer, param_needs_quantization=needs)
    with quantizer, patched(Bnb4bitQuantize, convert=convert):
        yield


def attention_of(model: Any) -> str | None:
    """Return the name of a model's implementation of attention, such as `sdpa`; None if it has no choice of them.

    `_attn_implementation` of its config has what `from_pretrained` chose where nothing was asked for.
    """
    return getattr(model.config, "_attn_implementation", None)


def saved_by_any_process() -> AbstractContextManager[None]:
    """Let `save_pretrained` write in whatever process of a run calls it within the context; else only rank 0's does."""
    from transformers import PreTrainedModel

    return patched(PreTrainedModel, should_save_on_this_rank=lambda _, is_main_process: is_main_process)


def load_best_checkpoint(trainer: Any) -> None:
    """Load the checkpoint that the trainer's state names as the best (`Trainer._load_best_model`).

    `load_best_model_at_end` does this after training. There is no public way to do it for a checkpoint of our choice.
    """
    trainer._load_best_model()


def gguf_files_read_once() -> AbstractContextManager[None]:
    """Let `from_pretrained` read a GGUF file once within the context: it takes seconds for a real vocabulary.

    transformers reads it for the tokenizer, for the config and for the weights, and maps the names of all tensors again
    for each module. It takes `gguf.GGUFReader` and `gguf.get_tensor_name_map` from their module at each use.
    """
    import gguf

    return patched(gguf, GGUFReader=cache(gguf.GGUFReader), get_tensor_name_map=cache(gguf.get_tensor_name_map))
