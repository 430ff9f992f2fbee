import pytest

from qlora_exp.config.hydra_compose import compose
from qlora_exp.config.trainer_settings import unplanned
from qlora_exp.utils.errors import ConfigError

WORKERS = "it needs training.dataloader_num_workers"
CUDA = "it needs a CUDA device, not device=cpu"


@pytest.mark.parametrize(
    ("argument", "words", "problem"),
    [
        ("tf32=false", ["device=cpu"], CUDA),
        ("torch_empty_cache_steps=2", ["device=mps"], "not device=mps"),
        ("dataloader_pin_memory=true", ["device=cpu"], CUDA),
        ("gradient_checkpointing_kwargs={offload: true}", ["device=cpu", "training.gradient_checkpointing=true"], CUDA),
        ("gradient_checkpointing_kwargs={every_n_layers: 2}", [], "needs training.gradient_checkpointing=true"),
        ("dataloader_prefetch_factor=2", [], WORKERS),
        ("dataloader_persistent_workers=true", [], WORKERS),
        ("dataloader_multiprocessing_context=spawn", [], WORKERS),
        ("torch_compile_mode=default", [], "needs training.torch_compile=true"),
        ("torch_compile_backend=eager", [], "needs training.torch_compile=true"),
        ("ddp_bucket_cap_mb=5", [], "needs distributed=ddp, not distributed=none"),
        ("ddp_broadcast_buffers=false", ["distributed=fsdp"], "needs distributed=ddp, not distributed=fsdp"),
        ("data_seed=1", ["training.train_sampling_strategy=sequential"], "draws no order"),
        ("eval_delay=1", ["training.eval_strategy=no"], "needs training.eval_strategy=steps or epoch"),
        ("eval_delay=9", ["training.max_steps=8", "training.eval_steps=2"], "more than training.max_steps=8"),
        (
            "eval_delay=1.5",
            ["training.max_steps=-1", "training.num_train_epochs=1", "training.eval_strategy=epoch"],
            "1.5 are more than training.num_train_epochs=1",
        ),
        ("label_smoothing_factor=0.1", ["training.loss_type=dft"], "training.loss_type=dft is not smoothed"),
        ("label_smoothing_factor=0.1", ["method=prompt_tuning"], "labels would not match"),
        ("label_smoothing_factor=0.1", ["distributed=fsdp"], "never tested with distributed=fsdp"),
        ("pad_to_multiple_of=8", ["training.packing=true"], "are not padded"),
        ("pad_to_multiple_of=8", ["training.padding=free"], "has no padding"),
        ("pad_to_multiple_of=4096", [], "more than training.max_length"),
    ],
)
def test_argument_that_fails_or_does_nothing_with_the_rest_is_refused(argument: str, words: list[str], problem: str):
    name = argument.partition("=")[0]
    with pytest.raises(ConfigError) as error:
        compose([*words, f"training.sft_config.{argument}"])
    (line,) = (line for line in str(error.value).splitlines() if line.startswith("training.sft_config."))
    assert line.startswith(f"training.sft_config.{name}")
    assert problem in line


def test_activations_are_offloaded_once():
    twice = "training.sft_config.gradient_checkpointing_kwargs={offload: true}"
    with pytest.raises(ConfigError, match="offloads activations too"):
        compose(["training.gradient_checkpointing=true", "training.activation_offloading=true", twice])


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["training.activation_offloading=true", "device=cpu"], f"training.activation_offloading: {CUDA}"),
        (["training=long_rows", "device=mps"], "training.activation_offloading: it needs a CUDA device"),
        (["training.activation_offloading=true", "distributed=fsdp"], "never tested with distributed=fsdp"),
        (["training.tiled_mlp=true", "distributed=deepspeed_zero3"], "never tested with distributed=deepspeed_zero3"),
        (["training.tiled_mlp=true", "training.torch_compile=true"], "never tested with training.torch_compile"),
        (["training.tiled_mlp=true", "method=lily"], "method=lily depends on all tokens of a batch"),
        (["training.tiled_mlp=true", "method=prefix_tuning"], "cannot compute activations again"),
        (["training.sft_config.activation_offloading=true"], "set training.activation_offloading instead"),
    ],
)
def test_long_rows_with_what_does_not_go_together_are_refused(words: list[str], problem: str):
    with pytest.raises(ConfigError) as error:
        compose(words)
    assert problem in str(error.value)


def test_long_rows_are_one_option():
    training = compose(["training=long_rows", "training.max_length=78475"]).training
    assert (training.gradient_checkpointing, training.activation_offloading, training.tiled_mlp) == (True, True, True)
    assert (training.per_device_train_batch_size, training.per_device_eval_batch_size) == (1, 1)


def test_null_is_as_if_an_argument_were_not_given():
    config = compose(["device=cpu", "training.sft_config={tf32: null, data_seed: null}"])
    assert [*unplanned(config.training.sft_config)] == []
