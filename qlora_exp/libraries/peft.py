"""Wrap PEFT's private parts. Checked on PEFT 0.21.2."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from peft import PeftType
from peft.tuners.adamss import layer as adamss
from peft.tuners.boft import layer as boft
from peft.tuners.frod import layer as frod
from peft.tuners.lora import monteclora
from peft.tuners.lora.variants import KasaLinearVariant, MontecloraLinearVariant
from peft.tuners.shira import config as shira_config
from peft.tuners.shira import layer as shira
from peft.utils.other import TrainableTokensWrapper

from qlora_exp.libraries.patching import patched


def add_peft_type(name: str) -> None:
    """Add a member to `PeftType`: PEFT accepts methods of other packages, but only under a name in this closed enum.

    Writes to the enum's private tables (`_member_map_`, `_value2member_map_`, `_member_names_`).
    """
    member: Any = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    setattr(PeftType, name, member)
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)


def loss_of_adapter(tuner: Any) -> Any:
    """Return what KaSA and MonteCLoRA add to the loss; 0 for other methods.

    These are `LoraModel._get_kasa_loss` and `._get_monteclora_loss`. PEFT expects training code to add them, but
    has no public name for them.
    """
    return tuner._get_kasa_loss() + tuner._get_monteclora_loss()


def follow_forward_of_base(adapted: Any) -> None:
    """Make an adaption prompt look up its base's `forward` at each call.

    PEFT stores the base's `forward` in its own attribute when the prompt is attached, but TRL replaces the base's
    `forward` later.
    """
    prompt = adapted.base_model
    prompt.forward = lambda *args, **kwargs: prompt.model(*args, **kwargs)


def complete_heads(adapted: Any) -> None:
    """Give output layers of which single rows are trained the attribute `bias`, which TRL's loss reads.

    PEFT's `TrainableTokensWrapper` passes on `weight` only. Biases are refused before: PEFT would leave them out.
    """
    wrappers: Any = (module for module in adapted.modules() if isinstance(module, TrainableTokensWrapper))
    for wrapper in wrappers:
        wrapper.bias = None


@contextmanager
def without_values(dequantized: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Let methods that look at values be built and run without them, with tensors of the same sizes.

    BOFT writes its permutations one element at a time. AdaMSS clusters the rows of weights: here into clusters of equal
    size. KaSA truncates weights when it first sees their values. MonteCLoRA draws its samples in advance, in the memory
    of the CPU: here a sample for each pass. SHiRA draws its mask with values; it and FRoD use sparse tensors.

    Args:
        dequantized: replaces PEFT's function that dequantizes a weight of bitsandbytes.
    """
    replacements: list[tuple[ModuleType | type, dict[str, Any]]] = [
        (adamss, {"slice_pca": _factors, "clustering_Z": _equal_clusters}),
        (boft.BOFTLayer, {"perm2mat": lambda _, indices: torch.empty(len(indices), len(indices))}),
        (frod.Linear, {"_get_frod_tensors": _frod_tensors, "_sparse_activation_mm": _frod_product}),
        (KasaLinearVariant, {"_apply_deferred_truncation": staticmethod(lambda *_: None)}),
        (monteclora, {"BufferedMontecloraSampler": _Sample}),
        (shira_config, {"random_mask": _mask}),
        (shira.Linear, {"get_delta_weight": lambda layer, name: _Scattered(layer, name)}),
        *(
            (import_module(f"peft.{module}"), {"dequantize_bnb_weight": dequantized})
            for module in ("tuners.hira.bnb", "utils.quantization_utils")
        ),
    ]
    with ExitStack() as patches:
        for owner, replaced in replacements:
            patches.enter_context(patched(owner, **replaced))
        yield


def create_samplers(adapted: Any) -> None:
    """Create MonteCLoRA's samplers, with their trained parameters: PEFT leaves that to the first pass with values."""
    for module in adapted.modules():
        for name, settings in getattr(module, "_lora_monteclora_config", {}).items():
            sampler = MontecloraLinearVariant._create_sampler(module, name, settings)
            module.lora_monteclora_sampler[name] = sampler


def _factors(tensor: torch.Tensor, r: int, device: Any, dtype: Any, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *batch, height, width = tensor.shape
    rank = min(r, height, width)
    return tuple(torch.empty(*batch, *shape, dtype=dtype, device=device) for shape in ((rank, width), (height, rank)))  # type: ignore[return-value]


def _equal_clusters(rows: torch.Tensor, count: int, _: int) -> tuple[torch.Tensor, int]:
    return torch.arange(len(rows), device="cpu") % min(count, len(rows)), min(count, len(rows))


def _mask(layer: Any, r: int, **_: Any) -> torch.Tensor:
    # A mask with as many elements as are chosen; the weight of a quantized layer has another shape.
    features = (layer.in_features, layer.out_features) if hasattr(layer, "in_features") else layer.weight.shape
    return torch.ones(1, r * sum(features))


class _Sample:
    """Sampler of MonteCLoRA that makes each sample when it is used, as large as one that is copied to the GPU."""

    def __init__(self, model: Any, **_: Any) -> None:
        self._sizes = {
            "z_mvn": (model.num_samples, model.in_features, model.out_features),
            "z_wishart": (model.out_features, model.out_features),
            "z_dirichlet": (model.num_samples,),
        }

    def get(self) -> dict[str, torch.Tensor]:
        return {name: torch.empty(size) for name, size in self._sizes.items()}


class _Scattered:
    """Update of SHiRA: added to a weight, it changes single elements, as its sparse tensor does."""

    def __init__(self, layer: Any, name: str) -> None:
        self._places = layer.shira_indices[name]
        self._values = layer.shira_weight[name] * layer.scaling[name]

    @classmethod
    def __torch_function__(cls, _func: Any, _types: Any, args: Any = (), _kwargs: Any = None) -> torch.Tensor:
        weight, update = args
        places = torch.empty(update._places.shape, dtype=torch.long, device=weight.device)
        return weight.index_put_(tuple(places), update._values.to(weight.dtype), accumulate=True)


class _Sparse:
    """Sparse matrix of FRoD."""

    def __init__(self, indices: torch.Tensor, values: torch.Tensor, size: int) -> None:
        self.indices, self.values, self.size = indices, values, size

    def to_dense(self) -> torch.Tensor:
        dense = torch.zeros(self.size, self.size, dtype=self.values.dtype, device=self.values.device)
        return dense.index_put_(tuple(self.indices), self.values)


def _frod_tensors(layer: Any, name: str, *, device: Any, dtype: Any) -> tuple[Any, ...]:
    moved = (tensors[name].to(device=device, dtype=dtype) for tensors in (layer.frod_U, layer.frod_V))
    values, diagonal = (
        tensors[name].to(device=device, dtype=dtype) for tensors in (layer.frod_lambda_s_values, layer.frod_lambda_l)
    )
    places = layer.frod_s_indices[name]
    indices = torch.empty(places.shape, dtype=torch.long, device=device)
    return *moved, _Sparse(indices, values, layer.in_features), diagonal


def _frod_product(_: Any, activations: torch.Tensor, sparse: _Sparse) -> torch.Tensor:
    if activations.dtype in (torch.float16, torch.bfloat16):
        return activations @ sparse.to_dense().t()
    return activations * sparse.values.sum()  # it keeps its factors, and makes nothing as large as a dense matrix
