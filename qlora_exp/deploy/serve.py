"""Serve a trained model at an OpenAI-compatible endpoint: commands of existing servers, and the folder that they need.

Starts no server itself.
"""

import importlib.util
import json
import os
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from qlora_exp.data.end_of_turn import end_of_turn
from qlora_exp.data.prompts import chat_template
from qlora_exp.deploy import export
from qlora_exp.deploy.load import Saved
from qlora_exp.deploy.untrusted_folders import check_tokenizer
from qlora_exp.models.files import GGUF_FILE, read_json
from qlora_exp.models.untrusted import bounded, explained, most_values
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
    """Check that the server is installed and can serve what was saved.

    Raises:
        ConfigError: it is not, or cannot; the message says what to do instead.
    """
    is_gguf = (saved.folder / GGUF_FILE).is_file()
    if is_gguf != (server == "llama.cpp"):
        raise ConfigError(
            "--with llama.cpp needs a GGUF file: run qlora-exp export ... --to gguf, and serve its folder"
            if server == "llama.cpp"
            else f"{saved.folder} contains a GGUF file, which can only be served --with llama.cpp"
        )
    missing = {
        "transformers": not importlib.util.find_spec("openai") and "pip install 'qlora-exp[serve]'",
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


def mlflow_model(folder: Path, made: Path) -> Path:
    """Write a transformers folder as an MLflow model for `mlflow models serve`; replace `made` if it exists."""
    import mlflow.transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # With transformers 5, MLflow 3.17 does not accept the path of a folder, so the model is loaded. MLflow also asks
    # the hub about a name that could exist there, so the path is made absolute.
    folder = folder.resolve()
    check_tokenizer(folder)
    with explained(str(folder)), bounded(str(folder), most_values(folder)):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=False)
        model.generation_config.stop_strings = None  # MLflow's pipeline does not pass the tokenizer that they need
        components = {"model": model, "tokenizer": AutoTokenizer.from_pretrained(folder, trust_remote_code=False)}
    requirements = ["mlflow", "torch", "transformers", "accelerate"]
    shutil.rmtree(made, ignore_errors=True)
    mlflow.transformers.save_model(components, str(made), task="llm/v1/chat", pip_requirements=requirements)
    return made


def server(name: str, folder: Path, host: str, port: int, device: str = "auto", stop: str | None = None) -> Server:
    """Return how the server `name` serves the model in `folder`; `stop` is the text that ends an answer, if any."""
    chat = f"http://{host}:{port}/v1/chat/completions"
    binaries, where = Path(sys.executable).parent, ["--host", host, "--port", str(port)]
    offline = {"HF_HUB_OFFLINE": "1"}
    if name == "transformers":
        command = [str(binaries / "transformers"), "serve", str(folder), "--device", device, *where]
        return Server(command, offline, chat, str(folder), stop)
    if name == "mlflow":
        command = [str(binaries / "mlflow"), "models", "serve", "-m", str(folder), "--env-manager", "local", *where]
        path = f"{binaries}{os.pathsep}{os.environ.get('PATH', '')}"  # it starts uvicorn by its name
        return Server(command, offline | {"PATH": path}, f"http://{host}:{port}/invocations", folder.name)
    if name == "vllm":
        return Server(["vllm", "serve", str(folder), *where], offline, chat, str(folder), stop)
    return Server(["llama-server", "-m", str(folder / GGUF_FILE), *where], {}, chat, GGUF_FILE, stop)


def commands(saved: Saved, out: Path, host: str, port: int) -> list[str]:
    """Return shell lines for each server that takes a folder or a file: a comment, commands, and an example request."""
    stop = stop_of(saved)
    if (saved.folder / GGUF_FILE).is_file():
        servers = [("llama.cpp", server("llama.cpp", saved.folder, host, port, stop=stop))]
    else:
        folder = out if saved.adapter else saved.folder
        servers = [(name, server(name, folder, host, port, stop=stop)) for name in ("transformers", "vllm")]
    if (unmerged := adapter_on_vllm(saved, host, port)) is not None:
        servers.append(("vllm, base model and adapter without merging", unmerged))
    merging = ["qlora-exp", "merge", saved.source, "--out", str(out)]
    merging += ["--uri", saved.tracking_uri] if saved.tracking_uri else []
    merge_first = [shlex.join(merging)] if saved.adapter else []
    return [
        line
        for name, each in servers
        for line in (f"# {name}", *([] if each is unmerged else merge_first), each.line, each.example)
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
    return Server(command, {}, f"http://{host}:{port}/v1/chat/completions", name, stop_of(saved))
