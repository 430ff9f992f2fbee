"""What is taken away is the model that was trained, whatever was trained and whatever loads it (`nox -s takeaway`).

Each run's logits at the end of training are compared with those of its merged folder in transformers 5 and 4, of its
GGUF file in llama.cpp, and of its saved adapter in PEFT alone. `TAKEAWAY_PYTHON` is the Python of an environment with
transformers 4, `TAKEAWAY_VLLM` a folder with vLLM's sources.
"""

import json
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xllamacpp
from helpers import tiny_models
from helpers.gguf_models import LLAMA3, make_pieces
from peft import PeftModel
from support import QUICK
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from qlora_exp.config.hydra_compose import compose
from qlora_exp.deploy import export, llama_cpp, load, merge
from qlora_exp.deploy.serving import commands as serve
from qlora_exp.models import transformers_4
from qlora_exp.models.quantization import guard_layers
from qlora_exp.recipe import finetune, save
from qlora_exp.utils.errors import ConfigError

HERE = Path(__file__).parent
TEXT = (
    "The bridge was closed for 2 years; when it opened again, the people of both towns came to see what had been done:"
    " new stone, new lamps, and a narrow path for bicycles. <|im_end|>\n\n\tHow long does it take?  Ünïcode 12345 🙂, "
    "don't DON'T  \r\n x = f(x) + 1 <|im_start|>user\n"
)
MESSAGES = [{"role": "user", "content": " Say river 5.\n"}]
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", {"tie_word_embeddings": False, "rope_theta": 500000.0}),
    "Llama, tied": ("llama", {"tie_word_embeddings": True, "rope_theta": 500000.0}),
    "Qwen2, tied": ("qwen2", {"tie_word_embeddings": True, "rope_theta": 1e6}),
    "Llama 3.1": (
        "llama",
        {
            "tie_word_embeddings": False,
            "rope_theta": 500000.0,
            "rope_scaling": {key: value for key, value in LLAMA3.items() if key != "rope_theta"},
        },
    ),
}
"""Models as transformers 4 saves them: the first version's `model_type`, and fields of its config."""
LORA = "method=lora method.r=4 method.target_modules=attention"
ROWS: dict[str, str] = {
    "full": "method=full",
    "LoRA, attention": LORA,
    "LoRA, all linear": "method=lora method.r=4 method.target_modules=all-linear",
    "LoRA + `modules_to_save=[embed_tokens]`": f"{LORA} method.modules_to_save=[embed_tokens]",
    "LoRA + `modules_to_save=[lm_head]`": f"{LORA} method.modules_to_save=[lm_head]",
    "LoRA + `modules_to_save=[embed_tokens,lm_head]`": f"{LORA} method.modules_to_save=[embed_tokens,lm_head]",
    "the same + `ensure_weight_tying`": (
        f"{LORA} method.modules_to_save=[embed_tokens] method.ensure_weight_tying=true"
    ),
    "LoRA on `embed_tokens`": "method=lora method.r=4 method.target_modules=[q_proj,embed_tokens]",
    "LoRA + `trainable_token_indices`": f"{LORA} method.trainable_token_indices=[600,602]",
    "LoRA, `bias=all`": f"{LORA} method.bias=all",
    "LoRA, `lora_bias`": f"{LORA} method.lora_bias=true",
    "LoRA, `rank_pattern`": f"{LORA} +method.rank_pattern={{v_proj:8}} +method.alpha_pattern={{q_proj:32}}",
    "DoRA": f"{LORA} lora_variant=dora",
    "rsLoRA": f"{LORA} lora_variant=rslora",
    "PiSSA": f"{LORA} lora_variant=pissa",
    "LoRA, `layer_replication`": f"{LORA} method.layer_replication=[[0,2],[0,2]]",
    "QLoRA, nf4": f"{LORA.replace('=lora', '=qlora')} quantization=nf4",
    "QLoRA, nf4, LoftQ": f"{LORA.replace('=lora', '=qlora')} quantization=nf4 lora_variant=loftq",
}
REFUSED = re.compile("shares the embedding's weights|leave method.layer_replication out")
COLUMNS = ("transformers 5", "transformers 4", "llama.cpp", "PEFT alone", "vLLM")
_cells: dict[tuple[str, str], dict[str, str]] = {}


@pytest.fixture(scope="module")
def version_4() -> Iterator[Callable[..., dict[str, Any]]]:
    """Give a function that asks a process with transformers 4."""
    command = [os.environ["TAKEAWAY_PYTHON"], str(HERE / "transformers_4.py")]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["version"].startswith("4.")

        def ask(name: str, **values: Any) -> dict[str, Any]:
            process.stdin.write(json.dumps([name, values]) + "\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline()) or {}
            assert "error" not in answer, (values, answer["error"])
            return answer

        yield ask
        process.stdin.close()


@pytest.fixture(scope="module")
def bases(version_4: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Save the bases with transformers 4."""
    folder = tmp_path_factory.mktemp("bases")
    tokenizer = tiny_models.tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "tokenizer" / "template").write_text(tiny_models.CHATML, "utf-8")
    named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    made = {}
    for name, (kind, fields) in BASES.items():
        made[name] = folder / name.replace(", ", "_").replace(" ", "")
        common = {"kind": kind, "tokenizer": str(folder / "tokenizer" / "tokenizer.json"), "scale": 4.0, "named": named}
        version_4("make", folder=str(made[name]), **common, **tiny_models.SIZES, **ids, **fields)
    return made


@pytest.fixture(scope="module", autouse=True)
def _table() -> Iterator[None]:
    """Write the table at the end: in each cell the greatest difference on any base."""
    yield
    lines = [f"| trained | {' | '.join(COLUMNS)} |", f"|{'---|' * (len(COLUMNS) + 1)}"]
    for row in dict.fromkeys(row for _, row in _cells):
        found = {base: cells for (base, named), cells in _cells.items() if named == row}
        texts = [
            ", ".join(_worst({base: cells.get(column, "") for base, cells in found.items()})) for column in COLUMNS
        ]
        lines.append(f"| {row} | {' | '.join(texts)} |")
    Path(os.environ["TAKEAWAY_TABLE"]).write_text("\n".join(lines) + "\n", "utf-8")


def _worst(cells: dict[str, str]) -> Iterator[str]:
    if numbers := [text for text in cells.values() if text[:1].isdigit()]:
        yield max(numbers, key=float)
    for text in dict.fromkeys(text for text in cells.values() if text and text not in numbers):
        bases = [base for base, each in cells.items() if each == text]
        yield text if len(bases) == len(cells) else f"{text} ({'; '.join(bases)})"


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("base", BASES)
def test_every_loader_gives_the_logits_of_the_trained_model(
    base: str, row: str, bases: dict[str, Path], version_4: Callable[..., Any], mlflow_uri: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    cells = _cells.setdefault((base, row), {})
    rows = [{"messages": [{"role": "user", "content": f"Say river {i}."}, {"role": "assistant", "content": "Done."}]}
            for i in range(24)]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [word for word in QUICK if not word.startswith(("model=", "dataset."))]
    words += [f"tracking.uri={mlflow_uri}", "model=hub", f"model.model_name_or_path={bases[base]}", "dataset=own"]
    words += ["dataset.path=rows.jsonl", "dataset.eval_size=2", "dataset.format=chat", "evaluation=loss_only"]
    words += ["dataset.messages_column=messages", "evaluation.before=false", "training.learning_rate=5e-3"]
    words += ["training.max_steps=6", "training.save_strategy=steps", "training.save_steps=6"]
    tokenizer = AutoTokenizer.from_pretrained(bases[base])
    ids = tokenizer(TEXT)["input_ids"]
    assert len(ids) > 100
    trained = _logits_when_saved(monkeypatch, ids)
    try:
        result = finetune.run(compose([*words, *ROWS[row].split()]), tmp_path / "run")
    except ConfigError as error:  # nothing is trained that cannot be taken away
        if trained or not REFUSED.search(str(error)):
            raise
        cells |= dict.fromkeys(COLUMNS, "refused before training")
        return
    saved = load.find(str(result.output_dir), device="cpu")
    quantized = saved.config.quantization.quantized
    if saved.adapter:
        alone = _peft_alone(saved, bases[base], ids)
        cells["PEFT alone"] = _compared(alone, trained[0])
        cells["vLLM"] = _on_vllm(saved)
    if "lora_bias" in row:
        with pytest.raises(ConfigError, match="cannot be merged"):
            merge.whole(saved)
        cells |= dict.fromkeys(COLUMNS[:3], "refused, warned of before training")
        return
    if saved.config.lora_start == "loftq":
        with pytest.raises(ConfigError, match="use --base trained"):
            merge.whole(saved, base="files")
        assert cells["vLLM"].startswith("merged only")
    for merged_into in ("trained", "files") if quantized and saved.config.lora_start is None else ("auto",):
        expected = trained[0]
        if merged_into == "files":
            expected = _peft_alone(saved, bases[base], ids, plain=True)
            cells = _cells.setdefault((base, f"{row}, merged into `files`"), {})
            ROWS.setdefault(f"{row}, merged into `files`", "")
        folder, file = result.output_dir / "model", tmp_path / f"{merged_into}-gguf"
        if saved.adapter:
            folder = tmp_path / merged_into
            export.export(saved, folder, base=merged_into)
        export.export(saved, file, "gguf", type_="f32", base=merged_into if saved.adapter else "auto")
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        cells["transformers 5"] = _compared(_logits(model, ids), expected)
        checkpoints = [] if saved.adapter else [*(result.output_dir / "checkpoints").glob("checkpoint-*")]
        assert saved.adapter or checkpoints
        for place in (*checkpoints, folder):
            asked = {"folder": str(place), "text": TEXT, "messages": MESSAGES}
            found = version_4("read", logits=str(tmp_path / "logits.npy"), **asked)
            assert found["ids"] == AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]
            assert found["prompt"] == tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]
            assert not found["missing_keys"]
            assert not found["unexpected_keys"]
            cells["transformers 4"] = _compared(torch.tensor(np.load(tmp_path / "logits.npy")), expected)
        cells["llama.cpp"] = _in_llama_cpp(file / load.GGUF_FILE, ids, expected, tokenizer)


TEMPLATES = {"default": tiny_models.CHATML, "tool_use": "{{ tools }}" + tiny_models.CHATML}
TOKENIZERS: dict[str, Callable[[], Any]] = {
    "list of special tokens": lambda: _with_more_special(["<|more|>", "<|h|>"]),
    "named special tokens": lambda: _with_more_special({"image_token": "<|more|>"}),
    "several templates": lambda: tiny_models.tokenizer(template=TEMPLATES),
    "BOS": lambda: tiny_models.tokenizer(bos_token="<|im_start|>", single="<|im_start|> $A"),
    "BOS and EOS": lambda: tiny_models.tokenizer(bos_token="<|im_start|>", single="<|im_start|> $A <|im_end|>"),
    "pieces": lambda: _with_template(make_pieces()),
}


def _with_template(made: Any) -> Any:
    made.chat_template = tiny_models.CHATML
    return made


def _with_more_special(more: Any) -> Any:
    special = (*tiny_models.SPECIAL, "<|more|>", "<|h|>")
    return tiny_models.tokenizer(special=special, extra_special_tokens=more)


@pytest.mark.parametrize("kind", ["TokenizersBackend", "LlamaTokenizer", "Qwen2Tokenizer", "GPT2Tokenizer"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers_are_read_by_both_versions(name: str, kind: str, version_4: Callable[..., Any], tmp_path: Path):
    TOKENIZERS[name]().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    values = json.loads(file.read_text()) | {"tokenizer_class": kind}
    file.write_text(json.dumps(values))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    transformers_4.add_old_names(tmp_path)
    found = version_4("read", folder=str(tmp_path), text=TEXT + "<|more|>x", messages=MESSAGES, logits=None)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert found["ids"] == again(TEXT + "<|more|>x")["input_ids"] == tokenizer(TEXT + "<|more|>x")["input_ids"]
    assert found["prompt"] == tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]
    assert {*found["special"]} == {*tokenizer.all_special_tokens}


def _logits_when_saved(monkeypatch: pytest.MonkeyPatch, ids: list[int]) -> list[torch.Tensor]:
    """Return a list that gets the logits of the model at the end of training, before it is saved."""
    logits: list[torch.Tensor] = []
    saves = save.save

    def saving(run: Any, tokens: Any, trainable: Any) -> None:
        model = trainable.trainer.model
        logits.append(_logits(model, ids))
        saves(run, tokens, trainable)

    monkeypatch.setattr(save, "save", saving)
    return logits


@torch.no_grad()
def _logits(model: Any, ids: list[int]) -> torch.Tensor:
    training = model.training
    logits: torch.Tensor = model.eval()(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
    model.train(training)
    return logits


def _peft_alone(saved: Any, base: Path, ids: list[int], plain: bool = False) -> torch.Tensor:
    """Return logits of the saved adapter in PEFT and transformers alone, on the base as it was trained on or plain."""
    options: dict[str, Any] = {}
    if saved.config.quantization.quantized and not plain:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **options)
    guard_layers(model)  # on some CPUs bitsandbytes would round what enters a layer to bfloat16
    return _logits(PeftModel.from_pretrained(model, str(saved.folder)), ids)


def _compared(actual: torch.Tensor, expected: torch.Tensor) -> str:
    """Return the greatest difference, after checking that it is a rounding error."""
    difference = (actual - expected).abs().max().item()
    assert difference <= 1e-5 * max(1.0, expected.abs().max().item())
    return f"{difference:.0e}"


def _in_llama_cpp(file: Path, ids: list[int], expected: torch.Tensor, tokenizer: Any) -> str:
    """Return the greatest difference of log probabilities after some beginnings of a text."""
    with _exact_cache():
        server = llama_cpp.load(file, 512, 1)
    every = expected.log_softmax(-1)
    # llama.cpp gives no probabilities where it cannot write the likeliest token: part of a character, or special.
    places = [place for place in range(20, len(ids)) if _is_text(tokenizer, ids[: place + 1], every[place].argmax())]
    actual, wanted = [], []
    for place in [*places[::12], places[-1]]:
        asked = {"prompt": ids[: place + 1], "n_predict": 1, "n_probs": 64, "temperature": 0, "ignore_eos": True}
        found = server.handle_completions(asked)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        actual += [token["logprob"] for token in found]
        wanted += [every[place, token["id"]].item() for token in found]
    return _compared(torch.tensor(actual), torch.tensor(wanted))


@contextmanager
def _exact_cache() -> Iterator[None]:
    """Let llama.cpp keep keys and values in 32 bits, not 16, whose rounding would hide other differences."""
    parameters = xllamacpp.CommonParams

    def exact() -> Any:
        made = parameters()
        made.cache_type_k = made.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        made.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        return made

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(xllamacpp, "CommonParams", exact)
        yield


def _is_text(tokenizer: Any, ids: list[int], following: torch.Tensor) -> bool:
    """Return whether a text and the token after it are whole characters, and the token is no special one."""
    text, new = tokenizer.decode(ids), tokenizer.decode(following, skip_special_tokens=True)
    return not text.endswith("\ufffd") and bool(new) and new.isascii()


def _on_vllm(saved: Any) -> str:
    """Return whether vLLM takes the adapter, after checking that our rule is not more lenient than vLLM's own."""
    helper = _vllm_helper()
    settings = json.loads((saved.folder / "adapter_config.json").read_text())
    command = serve.adapter_on_vllm(saved, "127.0.0.1", 8000)
    rank = 512 if command is None else int(command.command[command.command.index("--max-lora-rank") + 1])
    try:
        helper.from_dict(settings).validate_legal(types.SimpleNamespace(max_lora_rank=rank))
        refused = False
    except ValueError:
        refused = True
    assert command is None or not refused
    return "adapter" if command else f"merged only{'' if refused else ' (our rule)'}"


def _vllm_helper() -> Any:
    """Import vLLM's check of adapters from its sources, without its other parts."""
    if "vllm" not in sys.modules:
        package = types.ModuleType("vllm")
        package.__path__ = [os.environ["TAKEAWAY_VLLM"] + "/vllm"]
        logger, config, lora = (types.ModuleType(f"vllm.{name}") for name in ("logger", "config", "config.lora"))
        quiet = types.SimpleNamespace(info_once=lambda *_: None, warning_once=lambda *_: None)
        logger.init_logger, lora.LoRAConfig = lambda _: quiet, object
        sys.modules |= {"vllm": package, "vllm.logger": logger, "vllm.config": config, "vllm.config.lora": lora}
        folder = types.ModuleType("vllm.lora")
        folder.__path__ = [f"{package.__path__[0]}/lora"]
        sys.modules["vllm.lora"] = folder
    from vllm.lora.peft_helper import PEFTHelper

    return PEFTHelper
