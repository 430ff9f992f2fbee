"""What is predicted agrees with closed forms, with what a real run takes, and moves where it should."""

import json
from pathlib import Path

import pytest
import torch
from support import exit_code
from torch._subclasses.fake_tensor import FakeTensorMode

from qlora_exp.config.hydra_compose import compose, grid
from qlora_exp.environment.device import Device, resolve
from qlora_exp.models import base as models
from qlora_exp.planning import planner
from qlora_exp.planning.fake_tensors import Recorder
from qlora_exp.utils.errors import ConfigError, ModelError
from qlora_exp.utils.units import MIB

GPU = Device("cuda", "GPU", bf16=True, paging=True)
CPU = Device("cpu", "CPU", bf16=False, paging=False)
HIDDEN, INNER, LAYERS, VOCABULARY = 128, 256, 6, 512
ARCHITECTURE = (
    f"+model.architecture={{_name_or_path: random:llama, model_type: llama, vocab_size: {VOCABULARY},"
    f" hidden_size: {HIDDEN}, intermediate_size: {INNER}, num_hidden_layers: {LAYERS}, num_attention_heads: 4,"
    " num_key_value_heads: 4}"
)
LINEAR = LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * INNER)
REST = 2 * VOCABULARY * HIDDEN + (2 * LAYERS + 1) * HIDDEN


def predicted(*words: str, device: Device = GPU) -> planner.Prediction:
    config = compose(["model=tiny_llama", ARCHITECTURE, "training.max_length=64", *words])
    return planner.Planner(config, resolve(config, device)).predict()


def test_weights_states_and_gradients_are_those_of_the_closed_forms():
    full = predicted("method=full", "model.dtype=bfloat16", "optimizer=adamw_torch")
    assert full.trainable == full.total == LINEAR + REST
    assert full.phases["load"].kinds["trainable"] == 2 * full.total
    assert full.phases["steady"].kinds["optimizer"] >= 2 * 2 * full.total
    eight = predicted("method=full", "optimizer=adamw_bnb_8bit")
    matrices, table = LINEAR + VOCABULARY * HIDDEN, VOCABULARY * HIDDEN  # transformers keeps 32 bits for embeddings
    states = 2 * (matrices + matrices // 256 * 4 + 4 * table + 4 * (2 * LAYERS + 1) * HIDDEN)
    assert eight.phases["evaluation"].kinds["optimizer"] == states


@pytest.mark.parametrize(("name", "constants"), [("nf4", LINEAR / 16), ("nf4_double", LINEAR / 64 * (1 + 4 / 256))])
def test_a_4_bit_base_takes_half_a_byte_a_weight_and_its_constants(name: str, constants: float):
    kinds = predicted("method=qlora", f"quantization={name}").phases["load"].kinds
    assert kinds["weights"] == pytest.approx(LINEAR / 2 + 2 * REST, rel=1e-3)
    assert kinds["quantization"] == pytest.approx(constants, rel=0.03)


def test_int8_takes_a_byte_a_weight_and_a_scale_a_row():
    kinds = predicted("method=qlora", "quantization=int8").phases["load"].kinds
    assert kinds["weights"] == pytest.approx(LINEAR + 2 * REST, rel=1e-3)
    assert kinds["quantization"] == 4 * LAYERS * (5 * HIDDEN + 2 * INNER)


def test_more_rows_longer_rows_and_no_recomputing_take_more():
    def steady(*words: str) -> int:
        return predicted("method=lora", *words).phases["steady"].tensors

    base = steady()
    assert steady("training.per_device_train_batch_size=16") > base
    assert steady("training.max_length=256") > base
    assert steady("training.gradient_checkpointing=false") > base


def test_accumulated_gradients_stay_while_the_next_rows_are_computed():
    one, more = (
        predicted("method=full", "optimizer=adamw_bnb_8bit", f"training.gradient_accumulation_steps={steps}",
                  "training.per_device_train_batch_size=16").phases["steady"]
        for steps in (1, 4)
    )  # fmt: skip
    gradient = max(VOCABULARY * HIDDEN, HIDDEN * INNER) * 4
    assert one.tensors < more.tensors <= one.tensors + more.kinds["gradients"]
    assert more.kinds["gradients"] <= 4 * (LINEAR + REST) + gradient  # each once, and the one that is being added


def test_deeper_models_take_what_each_layer_takes():
    sizes = [
        predicted("method=lora", f"++model.architecture.num_hidden_layers={layers}").phases["steady"].tensors
        for layers in (16, 24, 32)
    ]
    assert sizes[2] - sizes[1] == sizes[1] - sizes[0] > 0


@pytest.mark.parametrize(
    "words", [["method=lora"], ["method=full"], ["method=lora", "training.gradient_checkpointing=true"]], ids=str
)
def test_a_real_run_takes_what_was_predicted(words: list[str], tmp_path: Path):
    config = compose(["model=tiny_llama", ARCHITECTURE, "training.max_length=64", "device=cpu", *words])
    resolved = resolve(config, CPU)
    found = planner.Planner(config, resolved).predict().phases["first_step"].allocated
    torch.manual_seed(0)
    model = planner.build_model(config, resolved, models.model_config(config.model), LAYERS)
    ids = torch.arange(4 * 64).view(4, 64) % VOCABULARY
    mask = torch.ones_like(ids)
    mask[0, 60:] = 0
    with torch.profiler.profile(profile_memory=True) as profiler:
        model.to_empty(device="cpu")
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        model.train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained)
        with planner.as_it_runs(on_cuda=False):
            planner.fused_loss(model, ids, mask).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    trace = json.loads((tmp_path / "trace.json").read_text("utf-8"))["traceEvents"]
    now = most = 0
    for event in trace:
        if event.get("name") == "[memory]":
            now += event["args"]["Bytes"]
            most = max(most, now)
    assert found == pytest.approx(most, rel=0.05)


@pytest.mark.parametrize(
    ("words", "error", "says"),
    [
        (["quantization=quanto_int4", "method=lora"], ConfigError, "cannot be planned yet"),
        (["method=lora", "++model.architecture.max_position_embeddings=32"], ConfigError, "has 32 positions"),
        (["method=lora", "++model.architecture.model_type=lama"], ModelError, "model.architecture"),
        (["method=boft"], ConfigError, "method=boft cannot be planned .its code looks at values"),
        (["method=lora", "training.torch_compile=true"], ConfigError, "torch_compile=true cannot be planned yet"),
        (["method=lora", "++model.architecture.num_attention_heads=7"], ModelError, "model.architecture"),
        (["method=lora", "~model.architecture._name_or_path"], ModelError, "says not whose it is"),
    ],
)
def test_what_cannot_be_planned_says_why(words: list[str], error: type[Exception], says: str):
    with pytest.raises(error, match=says):
        predicted(*words)


def test_the_architecture_of_one_model_is_not_taken_for_another():
    with pytest.raises(ModelError, match="nobody/none"):
        predicted("method=lora", "model.model_name_or_path=nobody/none")


def test_a_packed_batch_is_one_long_row():
    packed, padded = (predicted("method=lora", f"training.packing={on}").phases["steady"] for on in ("true", "false"))
    assert packed.tensors > padded.tensors  # its mask has the square of all tokens


# Model, method, rows of 512 tokens: MiB allocated at most in the first step and in later ones, on an H100 with random
# weights (`benchmarks/measured_h100.py`).
@pytest.mark.parametrize(
    ("method", "rows", "first", "steady"),
    [("lora", 1, 13_679, 13_721), ("lora", 4, 14_348, 14_650), ("qlora", 1, 4_294, 4_470), ("qlora", 4, 5_044, 5_220)],
)
def test_a_7b_takes_what_it_took_on_an_h100(method: str, rows: int, first: int, steady: int):
    config = compose(["model=llama2_7b", f"method={method}", f"training.per_device_train_batch_size={rows}"])
    phases = planner.Planner(config, resolve(config, GPU)).predict(evaluated=0).phases
    assert phases["first_step"].allocated / MIB == pytest.approx(first, rel=0.007)
    assert phases["steady"].allocated / MIB == pytest.approx(steady, rel=0.007)


def test_dropout_keeps_a_byte_a_value_on_a_gpu():
    recorder = Recorder()
    with FakeTensorMode(), recorder, planner.as_it_runs(on_cuda=True):
        x = torch.empty(64, 32, dtype=torch.bfloat16, requires_grad=True)
        torch.nn.functional.dropout(x, 0.5)
        torch.nn.functional.dropout(x, 0.5, training=False)
    taken = [event.nbytes for event in recorder.recording.events if event.nbytes > 0]
    assert taken == [2 * 64 * 32, 2 * 64 * 32, 64 * 32]  # x, what comes out, and what was kept of it


def test_the_loss_of_a_gpu_makes_no_copies_in_32_bits():
    vocabulary = 2**15
    words = ["training.per_device_train_batch_size=1", f"++model.architecture.vocab_size={vocabulary}"]
    steady = predicted("method=lora", *words).phases["steady"]
    assert steady.kinds["loss"] < 4 * vocabulary * HIDDEN


def test_weights_are_dequantized_into_the_dtype_that_they_had():
    config = compose(["model=tiny_llama", ARCHITECTURE, "method=qlora"])
    for device, dtype in ((GPU, torch.bfloat16), (CPU, torch.float32)):
        resolved = resolve(config, device)
        model = planner.build_model(config, resolved, models.model_config(config.model), 1)
        layer = next(module for module in model.modules() if type(module).__name__ == "Linear4bit")
        assert layer.weight.filled(torch.empty).quant_state.dtype == dtype


def test_paged_states_are_told_apart():
    prediction = predicted("method=full", "optimizer=paged_adamw_32bit")
    large = [count for count in [HIDDEN * INNER, HIDDEN**2, VOCABULARY * HIDDEN] if count >= 100_000]
    assert prediction.paged == 8 * sum(large) == 0
    big = predicted("method=full", "optimizer=paged_adamw_32bit", "++model.architecture.intermediate_size=1024")
    assert big.paged == 8 * LAYERS * 3 * HIDDEN * 1024


def test_lists_and_named_sweeps_become_runs():
    assert grid(["method.r=4,8", "seed=1"]) == [["method.r=4", "seed=1"], ["method.r=8", "seed=1"]]
    named = grid(["sweep=rank_scaling", "method.r=2,4"])
    assert len(named) == 4
    assert all("sweep=rank_scaling" in words for words in named)  # what the sweep sets besides is theirs too
    with pytest.raises(ConfigError, match="no option 'rank_scalling'"):
        grid(["sweep=rank_scalling"])


def run(*arguments: str) -> int:
    return exit_code("plan", "model=tiny_llama", ARCHITECTURE, "training.max_length=64", *arguments)


def test_the_command_says_whether_it_fits(capsys: pytest.CaptureFixture[str]):
    assert run("method=lora", "--gpu", "rtx4090", "training.max_steps=10", "--price", "0.5") == 0
    shown = capsys.readouterr().out
    assert "fits in 24 GiB (rtx4090)" in shown
    assert "for 10 steps" in shown
    assert "steady" in shown


def test_a_sweep_is_a_line_for_each_run(capsys: pytest.CaptureFixture[str]):
    assert run("method=lora,boft,qlora", "quantization=none", "--vram", "0.7") == 0
    shown = capsys.readouterr().out
    assert "3 runs" in shown
    assert "cannot be" in shown
    assert "needs a" in shown  # qlora, of an unquantized base


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--gpu", "rtx4091"], "did you mean 'rtx4090'"),
        (["--vram", "-3"], "--vram -3"),
        (["--vram", "8", "--gpu", "t4"], "one of them"),
        (["--price", "1"], "--price"),
    ],
)
def test_a_gpu_that_cannot_be_is_refused(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]):
    assert run("method=lora", *arguments) == 1
    assert says in capsys.readouterr().err


def test_layer_norms_in_float32_are_recomputed_so():
    config = compose(["model=opt_125m", "method=lora", "training.max_length=32"])
    assert planner.planner(config, GPU).predict().peak > 2 * 125_000_000


def test_lorafa_trains_and_keeps_states_of_one_of_two_matrices():
    both, one = (predicted("method=lora", f"optimizer={name}") for name in ("adamw_torch", "lorafa"))
    assert one.trainable == LAYERS * 16 * (4 * HIDDEN + 2 * INNER + HIDDEN)  # every B
    assert one.phases["evaluation"].kinds["optimizer"] == 2 * 4 * one.trainable
    assert both.trainable == one.trainable + LAYERS * 16 * (6 * HIDDEN + INNER)
    assert one.peak <= both.peak


def test_adafactor_keeps_a_row_and_a_column_of_each_matrix():
    kinds = predicted("method=full", "optimizer.optim=adafactor", "model.dtype=float32").phases["evaluation"].kinds
    matrices = LAYERS * (4 * 2 * HIDDEN + 3 * (HIDDEN + INNER)) + 2 * (VOCABULARY + HIDDEN)
    assert 4 * matrices <= kinds["optimizer"] < 4.5 * (matrices + (2 * LAYERS + 1) * HIDDEN)


def test_what_is_asked_of_values_is_denied_if_it_asks_for_any():
    assert predicted("method=vblora").trainable > 0  # it looks for infinities
