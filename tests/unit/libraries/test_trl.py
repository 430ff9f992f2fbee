import inspect
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from trl.kernels import chunked_logprob
from trl.models.activation_offloading import get_act_offloading_ctx_manager
from trl.trainer import utils
from trl.trainer.sft_trainer import SFTTrainer

from qlora_exp.libraries import trl as private
from qlora_exp.libraries.patching import patched
from qlora_exp.models.layers import tiling

KERNELS = ("_forward_tile", "_backward_tile", "_addmm_fp32")


@pytest.fixture
def scored(monkeypatch):
    """A function that trains a model on a row with two supervised tokens of eight, and says how many were scored."""
    kernel, counts = utils._ChunkedLogProbFunction.apply, []

    class Spy:
        @staticmethod
        def apply(hidden, *args):
            counts.append(len(hidden))
            return kernel(hidden, *args)

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Spy)
    monkeypatch.setattr(utils, "_use_triton", lambda device: device.type == "cuda")  # an earlier run replaced TRL's own
    shape = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = AutoModelForCausalLM.from_config(shape)
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))

    def score() -> int:
        ids = torch.arange(8)[None]
        labels = torch.where(ids < 6, -100, ids)
        model(input_ids=ids, labels=labels, use_cache=False, fused_lm_head=True).log_probs.sum().backward()
        return counts.pop()

    return score


def test_the_head_scores_what_use_triton_says(scored):
    assert [*inspect.signature(utils._use_triton).parameters] == ["device"]
    every = scored()  # TRL's own way on a CPU
    private.score_supervised_tokens_only()
    assert scored() == 2 < every
    with private.every_token_scored():
        assert scored() == every
    assert scored() == 2


def test_the_loss_calls_the_functions_that_are_replaced(scored):
    called = set()

    def spy(name: str):
        function = getattr(chunked_logprob, name)
        return lambda *args, **kwargs: called.add(name) or function(*args, **kwargs)

    with patched(chunked_logprob, **{name: spy(name) for name in KERNELS}):
        scored()
    assert called == set(KERNELS)
    assert [*inspect.signature(chunked_logprob._addmm_fp32).parameters] == ["acc", "a", "b"]


def test_the_loss_of_a_gpu_makes_no_values_and_is_put_back(scored):
    before = [getattr(chunked_logprob, name) for name in KERNELS]
    with private.loss_as_on_gpu():
        assert not any(getattr(chunked_logprob, name) in before for name in KERNELS)
        scored()
    assert [getattr(chunked_logprob, name) for name in KERNELS] == before


def test_trained_tokens_are_counted_in_this_attribute():
    """What a resumed run logs: tests/integration/test_run.py."""
    source = inspect.getsource(SFTTrainer)
    assert "self._total_train_tokens = 0" in source
    assert '["num_tokens"] = [self._total_train_tokens]' in source


def test_router_losses_are_kept_in_this_attribute():
    """What is logged without them: tests/integration/test_model_families.py."""
    source = inspect.getsource(SFTTrainer)
    assert 'self._metrics[mode]["aux_loss"].append(aux_loss)' in source
    trainer = SFTTrainer.__new__(SFTTrainer)
    trainer._metrics = {"train": {"aux_loss": [3.0, 2.0]}}
    assert private.last_router_loss(trainer) == 2.0


def test_experts_are_named_for_the_loss_that_reads_them():
    assert "num_experts = text_config.num_experts\n" in inspect.getsource(utils)
    config = AutoConfig.for_model("granitemoe", num_local_experts=4)
    private.name_experts(config)
    assert config.num_experts == 4
    assert "num_experts" not in config.to_dict()


class Copies:
    """What TRL takes of a device: streams that are always done."""

    class Stream:
        wait_stream = wait_event = record_event = synchronize = lambda *_: None

    current_stream = Stream
    stream = staticmethod(lambda _: nullcontext())
    empty_cache = staticmethod(lambda: None)


@pytest.mark.parametrize("streams", [False, True])
def test_checkpoints_that_were_offloaded_come_back_exactly(streams: bool, monkeypatch: pytest.MonkeyPatch):
    """TRL's own code, with the CPU as the device that tensors leave."""
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    monkeypatch.setattr(tiling, "LEAST", 16)
    shape = LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2)
    torch.manual_seed(0)
    model, ids = AutoModelForCausalLM.from_config(shape), torch.arange(160).reshape(2, 80) % 32
    expected = torch.autograd.grad(model(ids, labels=ids, use_cache=False).loss, [*model.parameters()])
    tiling.tile(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    with monkeypatch.context() as with_device:
        with_device.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
        with_device.setattr(torch, "get_device_module", lambda _: Copies)
        offloading = get_act_offloading_ctx_manager(model, use_pin_memory=False, use_streams=streams)
    private.offload_one_at_a_time(SimpleNamespace(maybe_activation_offload_context=offloading))
    assert offloading.max_fwd_stash_size == 1
    for _ in range(2):  # steps
        left = []
        with offloading:
            loss = model(ids, labels=ids, use_cache=False).loss
            left = [kept[0].shape for kept in offloading.tracker.values() if kept[1]]
            loss.backward()
        for parameter, gradient in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-7)
        model.zero_grad()
        assert left.count((2, 80, 32)) >= 3  # the input of each layer
        assert not offloading.tracker
