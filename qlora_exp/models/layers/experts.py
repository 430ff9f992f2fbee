"""Store the fused experts of a mixture of experts in 4 bits, as bitsandbytes stores a linear layer.

bitsandbytes replaces linear layers only. Fused experts are parameters of three dimensions, (experts, rows, columns),
that transformers' code reads as a whole or one expert at a time. `Experts4bit` is such a parameter: it looks like the
16-bit one and keeps packed values. An operation that reads it dequantizes what it reads, all experts or one, and frees
that afterwards. Autograd keeps the packed parameter for the backward pass, which dequantizes again, so that dequantized
weights are never in memory for more than one operation.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from bitsandbytes import functional

from qlora_exp.config.sections.distributed import DistributedConfig
from qlora_exp.config.sections.quantization import QuantizationConfig
from qlora_exp.libraries.torch import AS_PLAIN_TENSOR, TO_COPY, Wrapper, changed_by, ignored_by_ddp, tree_map
from qlora_exp.libraries.transformers import parameters_packed
from qlora_exp.models.targets import fused_experts
from qlora_exp.utils.errors import ConfigError

BLOCK = 64
"""Number of weights that share a constant in bitsandbytes' 4-bit types."""
_NESTED = 256
"""Number of constants that share a constant in double quantization."""
_MOST_VALUES = 2**31 - 1
"""Most values that bitsandbytes' kernels quantize or dequantize at once: they count in 32 bits."""
_aten: Any = torch.ops.aten


class Experts4bit(Wrapper):
    """Weights of all experts of a layer, or of one of them, in 4 bits; read-only.

    Its shape, strides and dtype are those of the weights that it stands for. Indexing one expert, transposing the last
    two dimensions and changing the dtype stay in 4 bits; every other operation gets dequantized weights.
    """

    parts: dict[str, torch.Tensor]
    """What is stored, for all experts: `packed` values, two in a byte, and `absmax`, a constant for each block; with
    double quantization also `offset`, `nested` and `code`."""
    whole: torch.Size
    """Shape of all experts."""
    stored_dtype: torch.dtype
    """Dtype before quantization."""
    quant_type: str
    """nf4 or fp4."""
    expert: int | None
    """Number of the expert; None: all."""
    transposed: bool
    """Whether the last two dimensions are swapped."""

    alone = True
    """Whether one expert is dequantized without the others."""

    __torch_function__ = AS_PLAIN_TENSOR

    def __new__(
        cls,
        parts: dict[str, torch.Tensor],
        whole: torch.Size,
        stored_dtype: torch.dtype,
        quant_type: str,
        *,
        expert: int | None = None,
        transposed: bool = False,
        dtype: torch.dtype | None = None,
    ) -> "Experts4bit":
        """Create a tensor of what is stored; `dtype` is what it is dequantized to, None: `stored_dtype`."""
        count, rows, columns = whole
        sizes, strides = [count, rows, columns], [rows * columns, columns, 1]
        if expert is not None:
            sizes, strides = sizes[1:], strides[1:]
        if transposed:
            sizes[-2:], strides[-2:] = sizes[:-3:-1], strides[:-3:-1]
        made: Any = cls.wrapping(sizes, strides, dtype or stored_dtype, parts["packed"].device)
        made.parts, made.whole, made.stored_dtype, made.quant_type = parts, whole, stored_dtype, quant_type
        made.expert, made.transposed = expert, transposed
        return made

    @classmethod
    def quantized(cls, weights: torch.Tensor, quantization: QuantizationConfig) -> "Experts4bit":
        """Quantize weights, (experts, rows, columns), to the same values as bitsandbytes' `quantize_4bit`."""
        count, size = weights.shape[0], weights[0].numel()
        step = max(1, _MOST_VALUES // size) if size % BLOCK == 0 else count
        kind = quantization.bnb_4bit_quant_type
        chunks = [
            functional.quantize_4bit(chunk.contiguous(), blocksize=BLOCK, quant_type=kind)
            for chunk in weights.split(step)
        ]
        absmax = torch.cat([state.absmax for _, state in chunks])
        parts = {"packed": torch.cat([packed for packed, _ in chunks]), "absmax": absmax}
        if quantization.bnb_4bit_use_double_quant:
            offset = absmax.mean()
            parts["absmax"], state = functional.quantize_blockwise(absmax - offset, blocksize=_NESTED)
            parts |= {"offset": offset, "nested": state.absmax, "code": state.code}
        return cls(parts, weights.shape, weights.dtype, kind)

    @classmethod
    def empty(
        cls,
        whole: torch.Size,
        dtype: torch.dtype,
        quantization: QuantizationConfig,
        make: Callable[..., torch.Tensor],
    ) -> "Experts4bit":
        """Return a tensor without values, for plans, of parts made by `make(shape, dtype=...)`."""
        blocks = -(-math.prod(whole) // BLOCK)
        parts = {"packed": make((-(-math.prod(whole) // 2), 1), dtype=torch.uint8)}
        if quantization.bnb_4bit_use_double_quant:
            parts |= {"absmax": make(blocks, dtype=torch.uint8), "offset": make((), dtype=torch.float32)}
            parts |= {"nested": make(-(-blocks // _NESTED), dtype=torch.float32), "code": make(256)}
        else:
            parts["absmax"] = make(blocks, dtype=torch.float32)
        return cls(parts, whole, dtype, quantization.bnb_4bit_quant_type)

    def filled(self, make: Callable[..., torch.Tensor]) -> torch.nn.Parameter:
        """Return a parameter like this one, of parts made by `make(shape, dtype=...)`."""
        return _parameter(self.like({name: make(part.shape, dtype=part.dtype) for name, part in self.parts.items()}))

    def dense(self) -> torch.Tensor:
        """Return the weights that this stands for, dequantized: an ordinary tensor."""
        if self.expert is None:
            values = self._dequantized(0, self.whole[0])
        elif not self.alone or math.prod(self.whole[1:]) % BLOCK:  # a block may have values of two experts
            values = self._dequantized(0, self.whole[0])[self.expert]
        else:
            values = self._dequantized(self.expert, self.expert + 1)[0]
        return (values.transpose(-2, -1) if self.transposed else values).to(self.dtype)

    def _dequantized(self, first: int, last: int) -> torch.Tensor:
        """Return the dequantized weights of some experts, (experts, rows, columns), in `stored_dtype`."""
        size = math.prod(self.whole[1:])
        step = max(1, _MOST_VALUES // size) if size % BLOCK == 0 else last - first
        chunks = []
        for start in range(first, last, step):
            begin, end = start * size, min(start + step, last) * size
            # On CPUs bitsandbytes 0.50.2 takes wrong constants for rows that are no whole number of blocks.
            shape = (1, end - begin) if (end - begin) % BLOCK else ((end - begin) // BLOCK, BLOCK)
            packed, absmax = self.parts["packed"][begin // 2 : -(-end // 2)], self._constants(begin, end)
            settings = BLOCK, self.quant_type, shape, self.stored_dtype
            chunks.append(torch.ops.bitsandbytes.dequantize_4bit(packed, absmax, *settings))
        values = chunks[0] if len(chunks) == 1 else torch.cat(chunks)
        return values.view(last - first, *self.whole[1:])

    def _constants(self, begin: int, end: int) -> torch.Tensor:
        """Return the constants of the blocks with these values, float32."""
        absmax, first, last = self.parts["absmax"], begin // BLOCK, -(-end // BLOCK)
        if "nested" not in self.parts:
            return absmax[first:last]
        start, stop = first // _NESTED, -(-last // _NESTED)
        values = functional.dequantize_blockwise(
            absmax[start * _NESTED : stop * _NESTED],
            absmax=self.parts["nested"][start:stop],
            code=self.parts["code"],
            blocksize=_NESTED,
        )
        values += self.parts["offset"]
        return values[first - start * _NESTED : last - start * _NESTED]

    def like(self, parts: dict[str, torch.Tensor] | None = None, **changed: Any) -> "Experts4bit":
        """Return a tensor that differs in what is stored, or in `expert`, `transposed` or `dtype`."""
        settings = {"expert": self.expert, "transposed": self.transposed, "dtype": self.dtype} | changed
        return type(self)(parts or self.parts, self.whole, self.stored_dtype, self.quant_type, **settings)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Run an operation with dequantized weights, or without them if it needs none."""
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, Experts4bit) and (result := _unread(first, func, args[1:], kwargs)) is not None:
            return result
        if any(isinstance(tensor, Experts4bit) for tensor in changed_by(func, args)):
            raise NotImplementedError(f"{func}: experts in 4 bits cannot be changed")
        return func(*tree_map(_dense, args), **tree_map(_dense, kwargs))

    def __deepcopy__(self, memo: dict[int, Any]) -> "Experts4bit":
        """Copy what is stored."""
        copied = self.like(deepcopy(self.parts, memo))
        return _parameter(copied) if isinstance(self, torch.nn.Parameter) else copied

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Describe shape and type: values would be dequantized."""
        return f"Experts4bit({tuple(self.shape)}, {self.dtype}, {self.quant_type})"


def _unread(experts: Experts4bit, func: Any, args: Any, kwargs: Any) -> Experts4bit | None:
    """Return the result of an operation that reads no values; None: it does."""
    swapped = [*range(experts.ndim)]
    swapped[-2:] = swapped[:-3:-1]
    match func.overloadpacket:
        case _aten.detach | _aten.alias:
            return experts.like()
        case _aten.clone:
            return experts.like({name: part.clone() for name, part in experts.parts.items()})
        case _aten.set_ if args[0] is experts:  # PEFT's parametrizations begin with that
            return experts
        case _aten.select if experts.expert is None and not experts.transposed and args[0] == 0:
            return experts.like(expert=args[1] % experts.whole[0])
        case _aten.t if experts.ndim == 2:
            return experts.like(transposed=not experts.transposed)
        case _aten.transpose if sorted(place % experts.ndim for place in args) == sorted(swapped[-2:]):
            return experts.like(transposed=not experts.transposed)
        case _aten.permute if [place % experts.ndim for place in args[0]] == swapped:
            return experts.like(transposed=not experts.transposed)
    if func.overloadpacket is TO_COPY:
        if (wanted := kwargs.get("device")) and torch.empty(0, device=wanted).device != experts.device:
            raise NotImplementedError("experts in 4 bits cannot be moved: load the model on its device")
        return experts.like(dtype=kwargs.get("dtype") or experts.dtype)
    return None


def _dense(value: Any) -> Any:
    return value.dense() if isinstance(value, Experts4bit) else value


def _parameter(experts: Experts4bit) -> Any:
    return torch.nn.Parameter(experts, requires_grad=False)


def packed_experts(model: torch.nn.Module) -> Iterator[tuple[str, Experts4bit]]:
    """Yield the experts of a model that are in 4 bits, with their full names."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, Experts4bit):
            yield name, parameter


def packing(quantization: QuantizationConfig) -> AbstractContextManager[None]:
    """Let `from_pretrained` with bitsandbytes store fused experts in 4 bits within the context, if so configured.

    The experts of one layer at a time are in memory unpacked.
    """
    if not quantization.packs_experts:
        return nullcontext()
    return parameters_packed(fused_experts, lambda weights: _parameter(Experts4bit.quantized(weights, quantization)))


def pack_meta(model: Any, quantization: QuantizationConfig) -> None:
    """Give the fused experts of a model on the meta device the form that `packing` gives them, if so configured."""
    if not quantization.packs_experts or getattr(model.config, "quantization_config", None) is not None:
        return
    for name in fused_experts(model):
        module, _, parameter = name.rpartition(".")
        weights = getattr(layer := model.get_submodule(module), parameter)
        empty = Experts4bit.empty(weights.shape, weights.dtype, quantization, partial(torch.empty, device="meta"))
        setattr(layer, parameter, _parameter(empty))


def check_use(model: torch.nn.Module, shared: DistributedConfig, torch_compile: bool | str = False) -> None:
    """Check that experts in 4 bits, if the model has any, are neither to be divided over processes nor compiled.

    Raises:
        ConfigError: they are.
    """
    if (name := next((name for name, _ in packed_experts(model)), None)) is None:
        return
    if shared.shards:
        raise ConfigError(
            f"distributed={shared.engine} cannot shard experts that are stored in 4 bits ({name}, ...): set "
            "quantization.bnb_4bit_experts=false, or use distributed=ddp, where each process has a whole copy"
        )
    if torch_compile:
        raise ConfigError(
            f"training.torch_compile takes minutes or longer with experts that are stored in 4 bits ({name}, ...): "
            "use training.torch_compile=false, or quantization.bnb_4bit_experts=false"
        )


def keep_from_ddp(model: torch.nn.Module) -> None:
    """Let DDP leave experts in 4 bits alone, which it could not send; each process has loaded its own."""
    if names := [name for name, _ in packed_experts(model)]:
        ignored_by_ddp(model, names)


@torch.no_grad()
def unpack(model: Any, dtype: torch.dtype) -> None:
    """Replace experts in 4 bits by dequantized ones of `dtype`, one parameter at a time."""
    for name, experts in [*packed_experts(model)]:
        module, _, parameter = name.rpartition(".")
        dense = torch.nn.Parameter(experts.dense().to(dtype), requires_grad=False)
        setattr(model.get_submodule(module), parameter, dense)
