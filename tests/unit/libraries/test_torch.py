import inspect
import os

import pytest
import torch
from torch.nn import functional
from torch.utils import _triton

from qlora_exp.libraries import torch as private


class Seen(private.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations.append(func)
        return func(*args, **(kwargs or {}))


def test_fake_tensors_have_shapes_and_no_values():
    with private.FakeTensorMode(allow_non_fake_inputs=True):
        made = torch.nn.Linear(3, 5)(torch.ones(2, 3))
        assert made.shape == (2, 5)
        for look in (lambda: made.sum().item(), made.nonzero):
            with pytest.raises(private.WANTS_VALUES):
                look()
    assert all(issubclass(one, RuntimeError) for one in private.WANTS_VALUES)


def test_a_dispatch_mode_sees_that_a_value_is_asked_for():
    with Seen() as seen:
        torch.ones(()).item()
    assert private.VALUE_OF_SCALAR in seen.operations


def test_an_unsafe_view_is_not_marked_as_a_view():
    with Seen() as seen:
        torch.ones(2, 3, 4) @ torch.ones(4, 5)
    found = [one for one in seen.operations if str(one.overloadpacket) == private.UNSAFE_VIEW]
    assert found
    assert not any(one.is_view for one in found)


def test_fused_attention_has_these_names():
    for name in private.FUSED_ATTENTION:
        for end in ("", "_backward"):
            assert hasattr(torch.ops.aten, name.removeprefix("aten.") + end), name
    with Seen() as seen:
        functional.scaled_dot_product_attention(*(torch.ones(1, 2, 8, 16) for _ in range(3)), is_causal=True)
    assert private.FUSED_ATTENTION[0] in {str(one.overloadpacket) for one in seen.operations}


def test_leaves_of_nested_arguments():
    assert private.tree_leaves(([1, {"a": 2}], (3, None), [])) == [1, 2, 3, None]
    assert private.tree_map(str, ([1, {"a": 2}], (3,))) == (["1", {"a": "2"}], ("3",))


def test_an_operation_names_what_it_writes():
    table, rows = torch.zeros(2, 2), torch.ones(2, 2)
    assert private.changed_by(torch.ops.aten.add_.Tensor, (table, rows)) == [table]
    assert private.changed_by(torch.ops.aten.add.Tensor, (table, rows)) == []
    with Seen() as seen:
        table.to(torch.float64)
    assert private.TO_COPY in {one.overloadpacket for one in seen.operations}


def test_a_tensor_without_storage_looks_like_one_with():
    class Sum(private.Wrapper):
        __torch_function__ = private.AS_PLAIN_TENSOR

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            return func(*private.tree_map(lambda value: torch.ones(2, 3) if isinstance(value, cls) else value, args))

    made = Sum.wrapping([2, 3], [3, 1], torch.float32, torch.device("cpu"))
    assert (made.shape, made.stride(), made.device.type) == ((2, 3), (3, 1), "cpu")
    assert type(made + 1) is torch.Tensor
    assert torch.equal(made + 1, torch.full((2, 3), 2.0))


def test_ddp_reads_the_names_that_it_shall_ignore():
    model = torch.nn.Linear(2, 2)
    private.ignored_by_ddp(model, ["bias"])
    assert model._ddp_params_and_buffers_to_ignore == ["bias"]
    assert "_ddp_params_and_buffers_to_ignore" in inspect.getsource(torch.nn.parallel.DistributedDataParallel.__init__)


@pytest.mark.parametrize("fake", [False, True])
def test_views_share_a_storage_address_and_others_do_not(fake: bool):
    def check() -> None:
        one, other = torch.ones(4), torch.ones(4)
        assert private.storage_address(one) == private.storage_address(one[1:])
        assert private.storage_address(one) != private.storage_address(other)

    if fake:
        with private.FakeTensorMode():
            check()
    else:
        check()


def test_the_device_of_a_fake_tensor_is_what_its_mode_answers():
    asks, mode = torch.ops.prim.device.default, private.FakeTensorMode()
    with mode:
        tensor = torch.empty(3, device="cuda")
    assert private.fake_device(asks, (tensor,)) == asks(tensor) == torch.device("cuda", 0)
    mode.in_kernel_invocation = True
    assert private.fake_device(asks, (tensor,)) is None
    assert private.fake_device(torch.ops.aten.neg.default, (tensor,)) is None
    assert private.fake_device(asks, (torch.empty(3),)) is None


def test_gpus_can_be_counted_through_nvml():
    assert not inspect.signature(torch.cuda._device_count_nvml).parameters
    assert private.counts_gpus_without_cuda() == (torch.cuda._device_count_nvml() > 0)


@pytest.mark.parametrize("before", [None, "0"])
def test_questions_about_gpus_are_answered_without_cuda(before: str | None, monkeypatch):
    variable = "PYTORCH_NVML_BASED_CUDA_CHECK"
    monkeypatch.delenv(variable, raising=False)
    if before is not None:
        monkeypatch.setenv(variable, before)
    original = torch.cuda.get_device_capability
    with private.gpus_without_cuda((9, 0)):
        assert torch.cuda.get_device_capability(0) == (9, 0)
        assert os.environ[variable] == "1"
    assert torch.cuda.get_device_capability is original
    assert os.environ.get(variable) == before
    assert variable in inspect.getsource(torch.cuda)


@pytest.mark.parametrize(("capability", "has"), [((9, 0), True), ([7, 5], True), ((6, 1), False)])
def test_whether_there_is_triton_is_answered_without_cuda(capability, has: bool, monkeypatch):
    monkeypatch.setattr(_triton, "has_triton_package", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: pytest.fail("starts CUDA"))
    original = _triton.has_triton
    assert not inspect.signature(original).parameters
    with private.gpus_without_cuda(capability):
        assert _triton.has_triton() is has
    assert _triton.has_triton is original


def test_on_a_gpu_layer_norms_are_in_float32_dropout_keeps_a_byte_a_value_and_autocast_is_on():
    assert [*inspect.signature(functional.layer_norm).parameters] == [
        "input",
        "normalized_shape",
        "weight",
        "bias",
        "eps",
    ]
    assert [*inspect.signature(functional.dropout).parameters] == ["input", "p", "training", "inplace"]
    x, kept = torch.ones(4, 8, dtype=torch.bfloat16, requires_grad=True), []

    def dropped() -> list[torch.dtype]:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one.dtype) or one, lambda one: one):
            torch.nn.Dropout(0.5)(x)
        return kept

    assert torch.bool not in dropped()  # on a CPU
    with private.computing_as_on_gpu(), torch.autocast("cpu", torch.bfloat16):
        assert torch.nn.LayerNorm(8)(x).dtype == torch.float32
        assert dropped() == [torch.bool]
        assert torch.is_autocast_enabled()
        with Seen() as seen:  # fused in spite of dropout, which a CPU's kernel does not have
            functional.scaled_dot_product_attention(*(torch.ones(1, 2, 8, 16) for _ in range(3)), dropout_p=0.5)
        assert private.FUSED_ATTENTION[0] in {str(one.overloadpacket) for one in seen.operations}
    query, one_head = torch.ones(1, 4, 8, 16), torch.ones(1, 1, 8, 16)
    for flash in (False, True):  # FlashAttention takes one head of keys and values for all queries
        with private.computing_as_on_gpu(flash), Seen() as seen:
            functional.scaled_dot_product_attention(query, one_head, one_head)
        assert (private.FUSED_ATTENTION[0] in {str(one.overloadpacket) for one in seen.operations}) is flash
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.is_autocast_enabled()  # of CUDA


def test_what_depends_on_values_is_answered_for_tensors_without_any():
    real = torch.tensor([1, 0, 3])
    with torch.device("meta"), private.AssumedValues():
        x = torch.empty(4, 3)
        assert (int(x[0, 0].item()), bool((x > 0).any())) == (1, False)
        assert x.nonzero().shape == (12, 2)
        assert x[:, torch.empty(3, dtype=torch.bool)].shape == (4, 3)
        x[torch.empty(4, dtype=torch.bool)] = 0.0
        assert torch.bincount(torch.empty(9, dtype=torch.long), minlength=7).shape == (7,)
        assert x.double().cpu().is_meta
        assert (real.max().item(), real.nonzero().shape) == (3, (2, 1))  # values that exist are read
    with pytest.raises(RuntimeError):  # else it is not needed any more
        torch.empty(4, device="meta").nonzero()


def test_singular_vectors_have_the_layout_of_the_device():
    matrix = torch.empty(6, 4, device="meta")
    assert torch.linalg.svd(matrix, full_matrices=False)[2][:2].is_contiguous()  # as with CUDA: a view
    assert not torch.linalg.svd(torch.ones(6, 4), full_matrices=False)[2][:2].is_contiguous()
    with private.factors_as_on_cpu():
        assert not torch.linalg.svd(matrix, full_matrices=False)[2][:2].is_contiguous()


def test_no_pickle_is_opened_inside(tmp_path):
    torch.save({}, tmp_path / "weights.bin")
    with private.without_pickles(ValueError("a pickle")), pytest.raises(ValueError, match="a pickle"):
        torch.load(tmp_path / "weights.bin")
    assert torch.load(tmp_path / "weights.bin") == {}


def test_precision_of_float32_is_put_back_also_after_an_error():
    before = torch.backends.fp32_precision
    with pytest.raises(KeyError), private.fp32_precision_kept():
        torch.backends.fp32_precision = "tf32"
        raise KeyError
    assert torch.backends.fp32_precision == before


def test_changes_of_a_tensor_are_counted():
    tensor = torch.zeros(2)
    before = private.times_changed(tensor)
    tensor.add_(1)
    assert private.times_changed(tensor) == before + 1


def test_a_saved_tensor_learns_which_node_asks_for_it():
    asked, done = [], []

    def load(tensor):
        node = private.running_node()
        node.register_hook(lambda *_: done.append(node.name()))
        asked.append(node.name())
        return tensor

    x = torch.ones(2, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, load):
        y = x.exp()
    y.sum().backward()
    assert asked == done == ["ExpBackward0"]


def test_tensors_without_values_are_told_from_others():
    assert not private.is_fake(torch.ones(2))
    with private.FakeTensorMode():
        assert private.is_fake(torch.ones(2))
