"""Show how a trained model is served at an OpenAI-compatible endpoint by other programs, and make what they need.

Starts no server itself.
"""

import json
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from qlora_exp.data.end_of_turn import end_of_turn
from qlora_exp.data.prompts import chat_template
from qlora_exp.deploy import export
from qlora_exp.deploy.formats import FIRST
from qlora_exp.deploy.load import Saved
from qlora_exp.models.files import GGUF_FILE, read_json
from qlora_exp.utils.errors import ConfigError


@dataclass(frozen=True)
class Server:
    """How to start a server, and how to send it a request."""

    command: list[str]
    environment: dict[str, str]
    url: str
    """Address of the server for OpenAI's chat completions."""
    model: str
    """Name of the model in a request."""
    stop: str | None = None
    """Text that ends an answer, which a request must name; None if a token does."""

    @property
    def line(self) -> str:
        """Shell command that starts the server."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*settings, shlex.join(self.command)])

    @property
    def example(self) -> str:
        """Shell command that sends the server a question."""
        request = {"model": self.model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64}
        if self.stop is not None:
            request["stop"] = [self.stop]
        return f"curl {self.url} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(request))}"


def check(server: str, saved: Saved) -> None:
    """Check that another server is installed and can serve what was saved.

    Raises:
        ConfigError: it is not, or cannot; the message says what to do instead.
    """
    is_gguf = (saved.folder / GGUF_FILE).is_file()
    if is_gguf != (server == "llama.cpp"):
        raise ConfigError(
            "--with llama.cpp needs a GGUF file: run qlora-exp export ... --to gguf, and serve its folder"
            if server == "llama.cpp"
            else f"--with {server}: {saved.folder} contains a GGUF file: serve it --with llama.cpp, or without --with"
        )
    missing = {
        "vllm": not shutil.which("vllm") and "pip install vllm, in an environment of its own, and put it on the PATH",
        "llama.cpp": not shutil.which("llama-server") and "install llama.cpp, and put `llama-server` on the PATH",
    }
    if advice := missing.get(server):
        raise ConfigError(f"--with {server}: this server is not installed: {advice}; --print only shows commands")


def stop_of(saved: Saved) -> str | None:
    """Return the text that ends an answer in the prompt format of a saved model; None if a token does.

    Raises:
        ModelError: the tokenizer is missing or incomplete.
    """
    tokenizer = saved.tokenizer()
    return end_of_turn(tokenizer, chat_template(saved.config.dataset, tokenizer)).stop


def folder_of(saved: Saved, out: Path) -> Path:
    """Return the folder of a complete model to serve; an adapter is merged into `out` first, unless that was done.

    Raises:
        ConfigError: `out` contains something else, or the adapter cannot be merged.
        ModelError: base model and adapter do not belong together, or a file is damaged.
    """
    if not saved.adapter:
        return saved.folder
    if not export.is_exported(saved, out):
        export.export(saved, out)
    return out


def server(name: str, folder: Path, host: str, port: int, stop: str | None = None) -> Server:
    """Return how the program `name` serves the model in `folder`; `stop` is the text that ends an answer, if any."""
    where = ["--host", host, "--port", str(port)]
    if name == "vllm":
        offline = {"HF_HUB_OFFLINE": "1"}
        return Server(["vllm", "serve", str(folder), *where], offline, _chat(host, port), str(folder), stop)
    return Server(["llama-server", "-m", str(folder / GGUF_FILE), *where], {}, _chat(host, port), GGUF_FILE, stop)


def own_server(saved: Saved, host: str, port: int) -> Server:
    """Return how this program serves a model, and is asked."""
    store = ["--uri", saved.tracking_uri] if saved.tracking_uri else []
    command = ["qlora-exp", "serve", saved.source, *store, "--host", host, "--port", str(port)]
    return Server(command, {}, _chat(host, port), FIRST)


def _chat(host: str, port: int) -> str:
    return f"http://{host}:{port}/v1/chat/completions"


def commands(saved: Saved, out: Path, host: str, port: int) -> list[str]:
    """Return shell lines for each server that takes a folder or a file: a comment, commands, and an example request."""
    stop = stop_of(saved)
    other = "llama.cpp" if (saved.folder / GGUF_FILE).is_file() else "vllm"
    servers = [
        ("transformers, in this program", own_server(saved, host, port)),
        (other, server(other, out if saved.adapter else saved.folder, host, port, stop)),
    ]
    if (unmerged := adapter_on_vllm(saved, host, port)) is not None:
        which = ""
        if (stored := saved.config.quantization).quantized:
            which = f" (a base that is not stored as {stored.name}, so another model than the run measured)"
        servers.append((f"vllm, base model and adapter without merging{which}", unmerged))
    merging = ["qlora-exp", "merge", saved.source, "--out", str(out)]
    merging += ["--uri", saved.tracking_uri] if saved.tracking_uri else []
    merge_first = {"vllm": [shlex.join(merging)]} if saved.adapter else {}
    return [
        line for name, each in servers for line in (f"# {name}", *merge_first.get(name, []), each.line, each.example)
    ]


_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM takes for --max-lora-rank."""
_READ_BY_VLLM = {"r", "lora_alpha", "use_rslora", "target_modules"}
_NOT_READ = {
    *("base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version", "lora_dropout"),
    *("init_lora_weights", "exclude_modules", "layers_to_transform", "layers_pattern", "ensure_weight_tying"),
    *("corda_config", "eva_config", "loftq_config", "lora_ga_config"),
}
"""What matters in training only, or shows in the names of the adapter's tensors."""


def adapter_on_vllm(saved: Saved, host: str, port: int) -> Server | None:
    """Return how vLLM serves a LoRA adapter on its base model without merging; None if vLLM cannot.

    vLLM reads a few settings of the adapter's config. An adapter that differs from PEFT's defaults in others (DoRA,
    whole modules, biases, ranks of single layers, trained embeddings) is refused by it, or would be another model.
    """
    from peft import LoraConfig

    if not saved.adapter or saved.config.method.peft_type != "LORA":
        return None
    if saved.config.lora_start == "loftq":  # it makes up for a quantized base, which vLLM would not have
        return None
    base = saved.config.model
    if base.model_name_or_path.startswith(("embedded:", "random:")):  # these models exist only in this project
        return None
    settings, defaults = read_json(saved.folder / "adapter_config.json"), LoraConfig().to_dict()
    others = settings.keys() - _READ_BY_VLLM - _NOT_READ
    if any(settings[name] and settings[name] != defaults.get(name) for name in others):
        return None
    with safe_open(saved.folder / "adapter_model.safetensors", "pt") as tensors:
        names = [*tensors.keys()]
    if any("lora_embedding" in name for name in names):
        return None
    rank = next((rank for rank in _VLLM_RANKS if rank >= settings.get("r", 8)), None)
    if rank is None:
        return None
    name = saved.run_id or "adapter"
    local = Path(base.model_name_or_path).expanduser()
    command = ["vllm", "serve", str(local.resolve()) if local.is_dir() else base.model_name_or_path]
    command += ["--revision", base.revision] if base.revision and not local.is_dir() else []
    command += ["--enable-lora", "--max-lora-rank", str(rank)]
    command += ["--lora-modules", f"{name}={saved.folder.resolve()}", "--host", host, "--port", str(port)]
    template = saved.folder / "chat_template.jinja"
    if template.is_file():
        command += ["--chat-template", str(template.resolve())]
    return Server(command, {}, _chat(host, port), name, stop_of(saved))
