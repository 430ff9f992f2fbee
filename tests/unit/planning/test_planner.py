"""What is predicted agrees with closed forms, with what a real run takes, and moves where it should."""

import gc
import json
import re
from pathlib import Path

import pytest
import torch
from helpers.planning import ARCHITECTURE, CPU, GPU, HIDDEN, INNER, LAYERS, LINEAR, REST, VOCABULARY, predict
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from qlora_exp.config.hydra_compose import compose
from qlora_exp.config.sections.distributed import DistributedConfig
from qlora_exp.environment.device import resolve
from qlora_exp.models import adapters, base
from qlora_exp.models.quantization import weights_bytes
from qlora_exp.planning import planner
from qlora_exp.planning.recording.fake_tensors import Recorder
from qlora_exp.utils.errors import ConfigError, ModelError
from qlora_exp.utils.units import MIB

pytestmark = pytest.mark.slow


def test_weights_and_states_match_closed_forms():
    full = predict("method=full", "model.dtype=bfloat16", "optimizer=adamw_torch")
    assert full.trainable == full.total == LINEAR + REST
    assert full.phases["load"].kinds["trainable"] == 2 * full.total
    assert full.phases["steady"].kinds["optimizer"] >= 2 * 2 * full.total
    eight = predict("method=full", "optimizer=adamw_bnb_8bit", evaluated=8)
    matrices, table = LINEAR + VOCABULARY * HIDDEN, VOCABULARY * HIDDEN  # transformers keeps 32 bits for embeddings
    states = 2 * (matrices + matrices // 256 * 4 + 4 * table + 4 * (2 * LAYERS + 1) * HIDDEN)
    assert eight.phases["evaluation"].kinds["optimizer"] == states


def test_prediction_is_the_same_whenever_garbage_is_collected():
    def prediction(threshold: int) -> dict[str, int]:
        before = gc.get_threshold()
        gc.set_threshold(threshold)
        try:
            phases = predict("method=qlora", evaluated=32).phases
        finally:
            gc.set_threshold(*before)
        return {name: phase.reserved for name, phase in phases.items()}

    assert prediction(1) == prediction(700) == prediction(10**6)


def test_larger_batches_and_no_checkpointing_take_more_memory():
    config = compose(["model=tiny_llama", ARCHITECTURE, "training.max_length=64", "method=lora"])
    plan = planner.planner(config, GPU)

    def steady(prediction: planner.Prediction) -> int:
        return prediction.phases["steady"].tensors

    least = steady(plan.predict(evaluated=0))
    assert steady(plan.predict(rows=16, evaluated=0)) > least
    assert steady(plan.predict(length=256, evaluated=0)) > least
    assert steady(predict("method=lora", "training.gradient_checkpointing=false")) > least


def test_accumulated_gradients_are_kept_during_the_next_batch():
    one, more = (
        predict("method=full", "optimizer=adamw_bnb_8bit", f"training.gradient_accumulation_steps={steps}",
                  "training.per_device_train_batch_size=16").phases["steady"]
        for steps in (1, 4)
    )  # fmt: skip
    gradient = max(VOCABULARY * HIDDEN, HIDDEN * INNER) * 4
    assert one.tensors < more.tensors <= one.tensors + more.kinds["gradients"]
    assert more.kinds["gradients"] <= 4 * (LINEAR + REST) + gradient  # each once, and the one that is being added


@pytest.mark.thorough
def test_memory_grows_linearly_with_layers():
    sizes = [
        predict("method=lora", f"++model.architecture.num_hidden_layers={layers}").phases["steady"].tensors
        for layers in (6, 8, 10)
    ]
    assert sizes[2] - sizes[1] == sizes[1] - sizes[0] > 0


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["method=lora"], marks=pytest.mark.thorough),
        ["method=full"],
        ["method=lora", "training.gradient_checkpointing=true"],
    ],
    ids=str,
)
def test_prediction_matches_a_profiled_step(words: list[str], tmp_path: Path):
    layers = 6  # more than a plan runs
    words = ["model=tiny_llama", ARCHITECTURE, f"++model.architecture.num_hidden_layers={layers}", *words]
    config = compose([*words, "training.max_length=64", "device=cpu"])
    resolved = resolve(config, CPU)
    found = planner.Planner(config, resolved).predict().phases["first_step"].allocated
    torch.manual_seed(0)
    model = planner.build_model(config, resolved, base.model_config(config.model), layers)
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


def test_rows_that_are_padded_to_a_multiple_are_as_long_as_it():
    padded = predict("method=lora", "training.max_length=20", "training.sft_config.pad_to_multiple_of=16")
    assert padded.phases == predict("method=lora", "training.max_length=32").phases


@pytest.mark.parametrize(
    ("words", "error", "says"),
    [
        (["quantization=quanto_int4", "method=lora"], ConfigError, "cannot be planned yet"),
        (["method=lora", "++model.architecture.max_position_embeddings=32"], ConfigError, "has only 32 positions"),
        (["method=lora", "++model.architecture.model_type=lama"], ModelError, "model.architecture"),
        (["method=adamss", "method.use_dynamic_rank=true"], ConfigError, "use_dynamic_rank=true cannot be planned yet"),
        (["method=lora", "training.torch_compile=true"], ConfigError, "torch_compile=true cannot be planned yet"),
        (
            ["method=lora", "training.activation_offloading=true", "training.gradient_checkpointing=false"],
            ConfigError,
            "training.activation_offloading=true without gradient_checkpointing cannot be planned yet",
        ),
        (
            ["distributed=deepspeed_zero3", "distributed.num_processes=2"],
            ConfigError,
            "deepspeed_zero3 cannot be planned",
        ),
        (["method=lora", "++model.architecture.num_attention_heads=7"], ModelError, "model.architecture"),
        (["method=lora", "~model.architecture._name_or_path"], ModelError, "does not name its model"),
    ],
)
def test_config_that_cannot_be_planned_is_rejected_with_its_reason(words: list[str], error: type[Exception], says: str):
    with pytest.raises(error, match=says):
        predict(*words)


# Methods whose code looks at values, which a plan does not have.
@pytest.mark.parametrize(
    "words",
    [
        *([f"method={name}"] for name in ("adamss", "boft", "frod", "shira")),
        *(pytest.param([f"method={name}"], marks=pytest.mark.thorough) for name in ("psoft", "unilora", "waveft")),
        ["method=lora", "lora_variant=monteclora"],
        pytest.param(["method=lora", "lora_variant=kasa"], marks=pytest.mark.thorough),
    ],
    ids=lambda words: words[-1],
)
def test_method_that_looks_at_values_is_planned_as_it_is_built(words: list[str]):
    config = compose(["model=tiny_llama", ARCHITECTURE, "training.max_length=16", "device=cpu", *words])
    prediction = planner.planner(config, CPU).predict(evaluated=0)
    torch.manual_seed(0)
    skeleton = AutoModelForCausalLM.from_config(base.model_config(config.model))
    model = adapters.attach(skeleton, adapters.peft_config(config, skeleton), None)
    assert (prediction.trainable, prediction.total) == adapters.count_parameters(model)
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers())}
    static = sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
    assert prediction.phases["load"].allocated == static
    assert prediction.phases["first_step"].allocated > static


@pytest.mark.parametrize("method", ["hira", "shira"])
def test_method_that_dequantizes_weights_is_planned_on_4_bits(method: str):
    words = [f"method={method}", "training.max_length=16"]
    assert predict(*words, "quantization=nf4").trainable == predict(*words).trainable


def test_view_of_a_factor_keeps_all_of_it_on_a_gpu():
    """PSOFT keeps a slice of the right singular vectors of each weight: CUDA's are stored by rows."""
    slices = predict("method=psoft", device=CPU), predict("method=psoft")
    on_cpu, on_gpu = (found.phases["load"].kinds["weights"] for found in slices)
    rank, shapes = 16, [*[(HIDDEN, HIDDEN)] * 4, *[(INNER, HIDDEN)] * 2, (HIDDEN, INNER)]
    more = LAYERS * sum(4 * inputs * (min(outputs, inputs) - rank) for outputs, inputs in shapes)
    assert on_gpu == on_cpu - 2 * (LINEAR + REST) + more


SMALL = "vocab_size: 512, hidden_size: 128, num_hidden_layers: 2, num_attention_heads: 4"
GPT = "vocab_size: 512, n_embd: 128, n_layer: 2, n_head: 4"


def planned(architecture: str, *words: str) -> int:
    described = f"model.architecture={{_name_or_path: random:llama, {architecture}}}"
    words = (described, "training.max_length=256", "method=full", "training.gradient_checkpointing=false", *words)
    return planner.planner(compose(["model=tiny_llama", *words]), GPU).predict(evaluated=0).peak


@pytest.mark.parametrize(
    "architecture",
    [
        f"model_type: llama, intermediate_size: 256, {SMALL}, attention_dropout: ",
        f"model_type: gpt_bigcode, {GPT}, attn_pdrop: ",
    ],
    ids=["llama", "gpt_bigcode"],
)
def test_attention_with_dropout_is_planned_as_fused_kernels_keep_it(architecture: str):
    without, with_dropout = planned(f"{architecture}0.0"), planned(f"{architecture}0.1")
    assert with_dropout == without
    assert planned(f"{architecture}0.1", "model.attn_implementation=eager") > with_dropout


def test_attention_with_one_head_of_keys_is_fused_with_flash_attention_only():
    falcon = f"model_type: falcon, {SMALL}, multi_query: true, new_decoder_architecture: false"
    fused, whole = (planned(falcon, *words) for words in (["model.attn_implementation=flash_attention_2"], []))
    assert fused < whole


def test_model_without_fused_attention_is_planned_with_its_own():
    bloom = f"model_type: bloom, {GPT.replace('n_embd', 'hidden_size')}"
    assert planned(bloom) == planned(bloom, "model.attn_implementation=eager")


def test_architecture_of_another_model_is_not_used():
    with pytest.raises(ModelError, match="nobody/none"):
        planner.planner(compose(["model=llama3_8b", "model.model_name_or_path=nobody/none"]), GPU)


def test_memory_of_a_single_row_does_not_grow_with_its_square():
    config = compose(["model=tiny_llama", ARCHITECTURE, "method=lora", "training.per_device_train_batch_size=1"])
    plan = planner.planner(config, GPU)
    short, long = (plan.predict(length=length, evaluated=0).phases["steady"] for length in (1024, 2048))
    moved = [phase.kinds["activations"] + phase.kinds["temporary"] - 2 * 32 * MIB for phase in (short, long)]
    assert moved[0] < moved[1] < 2.02 * moved[0]


def test_offloaded_checkpoints_are_in_the_machines_memory():
    words = ["method=lora", "training.per_device_train_batch_size=1", "training.max_length=2000"]
    words += ["++model.architecture.num_hidden_layers=12"]
    kept, moved = (predict(*words, f"training.activation_offloading={on}") for on in ("false", "true"))
    assert kept.activations_offloaded == 0
    layers = 12 * MIB // 2  # each 2000 x 128 values of two bytes, in a power of two
    assert layers <= moved.activations_offloaded <= layers + 4 * MIB  # and what the last norm and the loss need
    less = kept.phases["steady"].tensors - moved.phases["steady"].tensors
    assert less > 9 * 2000 * HIDDEN * 2


def test_tiles_take_less_than_whole_rows():
    words = ["method=qlora", "training.per_device_train_batch_size=1", "training.max_length=2048"]
    whole, tiled = (predict(*words, f"training.tiled_mlp={on}").phases["steady"].tensors for on in ("false", "true"))
    assert tiled < whole - 1024 * HIDDEN * 2  # at least a norm's part of the row


def test_packed_batch_is_planned_as_one_long_row():
    packed, padded = (predict("method=lora", f"training.packing={on}").phases["steady"] for on in ("true", "false"))
    assert packed.tensors > padded.tensors  # its mask has the square of all tokens


# Model, method, rows of 512 tokens: MiB allocated at most in the first step and in later ones, on an H100 with random
# weights (`benchmarks/measured_h100.py`).
@pytest.mark.parametrize(
    ("method", "measured"),
    [
        pytest.param("lora", {1: (13_679, 13_721), 4: (14_348, 14_650)}, marks=pytest.mark.thorough),
        ("qlora", {1: (4_294, 4_470), 4: (5_044, 5_220)}),
    ],
    ids=["lora", "qlora"],
)
def test_prediction_matches_a_7b_measured_on_an_h100(method: str, measured: dict[int, tuple[int, int]]):
    config = compose(["model=llama2_7b", f"method={method}"])
    plan = planner.Planner(config, resolve(config, GPU))
    for rows, (first, steady) in measured.items():
        phases = plan.predict(rows, evaluated=0).phases
        assert phases["first_step"].allocated / MIB == pytest.approx(first, rel=0.007)
        assert phases["steady"].allocated / MIB == pytest.approx(steady, rel=0.007)


def test_dropout_keeps_a_byte_per_value_on_a_gpu():
    recorder = Recorder()
    with FakeTensorMode(), recorder, planner.as_it_runs(on_cuda=True):
        x = torch.empty(64, 32, dtype=torch.bfloat16, requires_grad=True)
        torch.nn.functional.dropout(x, 0.5)
        torch.nn.functional.dropout(x, 0.5, training=False)
    taken = [event.nbytes for event in recorder.recording.events if event.nbytes > 0]
    assert taken == [2 * 64 * 32, 2 * 64 * 32, 64 * 32]  # x, what comes out, and what was kept of it


def test_loss_on_a_gpu_makes_no_float32_copies():
    vocabulary = 2**15
    words = ["training.per_device_train_batch_size=1", f"++model.architecture.vocab_size={vocabulary}"]
    steady = predict("method=lora", *words).phases["steady"]
    assert steady.kinds["loss"] < 4 * vocabulary * HIDDEN


def test_float32_layer_norms_can_be_planned():
    config = compose(["model=opt_125m", "method=lora", "training.max_length=32"])
    assert planner.planner(config, GPU).predict().peak > 2 * 125_000_000


def test_code_that_asks_whether_any_value_holds_gets_no():
    assert predict("method=vblora").trainable > 0  # it looks for infinities


def test_experts_that_stay_unquantized_are_said():
    model = ["model=tiny_llama", "model.model_name_or_path=random:qwen3_moe", "method.lora_dropout=0"]
    config = compose([*model, "quantization.bnb_4bit_experts=false"])
    few = planner.build_model(config, resolve(config, GPU), base.model_config(config.model), 2)
    experts, routers = 2 * 4 * 3 * 64 * 32, 2 * 4 * 64
    said = rf"only 33\.1% of .*; {experts + routers:,} weights, most of them in fused experts, stay in bfloat16"
    assert re.search(said, few.unquantized)


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["model.model_name_or_path=random:gpt_oss"], marks=pytest.mark.thorough),
        pytest.param(["method.target_modules=attention"], marks=pytest.mark.thorough),
        ["training.gradient_checkpointing=true"],
    ],
    ids=str,
)
def test_experts_in_4_bits_are_planned_as_a_profiled_step_takes(words: list[str], tmp_path: Path):
    sizes = ["+model.random_config.num_hidden_layers=6", "+model.random_config.hidden_size=128"]
    model = ["model=tiny_llama", "model.model_name_or_path=random:mixtral", *sizes, "method.lora_dropout=0"]
    config = compose([*model, "method=qlora", "optimizer=adamw_torch", "training.max_length=64", "device=cpu", *words])
    resolved = resolve(config, CPU)
    found = planner.Planner(config, resolved).predict(4).phases["first_step"].allocated
    ids = torch.arange(4 * 64).view(4, 64) % 200
    mask = torch.ones_like(ids)
    mask[0, 60:] = 0
    before = base.load_model(config.model, config.quantization, resolved)
    add_fused_lm_head(before, outputs=("log_probs", "entropy", "is_top1"))
    trace = tmp_path / "trace.json"
    with torch.profiler.profile(profile_memory=True) as profiler:
        adapted = adapters.attach(before, adapters.peft_config(config, before), resolved.adapter_dtype).train()
        if resolved.gradient_checkpointing:
            before.enable_input_require_grads()
            before.gradient_checkpointing_enable({"use_reentrant": False})
        trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained)
        planner.fused_loss(adapted, ids, mask).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    profiler.export_chrome_trace(str(trace))
    now = most = weights_bytes(before) - sum(parameter.nbytes for parameter in trained)
    for event in json.loads(trace.read_text("utf-8"))["traceEvents"]:
        if event.get("name") == "[memory]":
            now += event["args"]["Bytes"]
            most = max(most, now)
    assert found == pytest.approx(most, rel=0.03)


def test_loading_has_the_experts_of_a_layer_unpacked():
    config = compose(["model=tiny_llama", "model.model_name_or_path=random:mixtral", "method.lora_dropout=0"])
    plan = planner.Planner(config, resolve(config, CPU)).predict(1, 8, evaluated=0)
    assert plan.phases["load"].kinds["temporary"] == 2 * 4 * 256 * 64 * 4


def test_experts_in_4_bits_are_not_planned_in_shares():
    config = compose(["model=tiny_llama", "model.model_name_or_path=random:mixtral", "method.lora_dropout=0"])
    sharded = config.model_copy(update={"distributed": DistributedConfig(engine="fsdp", num_processes=2)})
    with pytest.raises(ConfigError, match="fsdp cannot shard experts that are stored in 4 bits"):
        planner.Planner(sharded, resolve(sharded, GPU))


@pytest.mark.thorough
def test_mixture_of_experts_is_planned_in_float32():
    config = compose(["model=tiny_llama", "model.model_name_or_path=random:qwen3_moe", "method=full", "device=cpu"])
    plan = planner.Planner(config, resolve(config, CPU)).predict(evaluated=0)
    assert plan.peak > 16 * plan.total > 16 * 2 * 4 * 3 * 64 * 32  # weights, gradients and states, those of experts too


@pytest.mark.thorough
def test_new_tokens_are_planned():
    tokens = ['model.new_tokens=["<tool>","</tool>"]']
    without, added = (predict("method=lora", *more, device=CPU) for more in ([], tokens))
    rows = 2 * 2 * HIDDEN  # of the embedding and of the output layer
    assert added.trainable - without.trainable == rows
    assert added.total - without.total == 2 * rows


def test_rows_without_padding_are_planned_as_one_sequence():
    found = predict("method=lora", "training.padding=free", "training.per_device_train_batch_size=4")
    one = ["training.packing=true", "training.max_length=256", "training.per_device_train_batch_size=1"]
    packed = predict("method=lora", *one)
    assert (found.phases, found.work) == (packed.phases, packed.work)


def test_more_recomputed_layers_than_there_are_is_rejected():
    words = ["method=lora", "training.gradient_checkpointing=true", "training.recomputed_layers=3"]
    with pytest.raises(ConfigError, match="recomputed_layers=3: this model has 2 layers"):
        predict(*words)


def test_batch_that_no_device_holds_is_refused_at_once():
    config = compose(["model=tiny_llama", "method=lora", "training.per_device_train_batch_size=2147483648"])
    with pytest.raises(ConfigError, match=r"a batch of 1,099,511,627,776 tokens cannot be planned"):
        planner.planner(config, GPU).predict()
