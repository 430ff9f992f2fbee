"""What a run trained behind an OpenAI-compatible endpoint: the commands of servers that exist, and a folder for them.

Knows which server wants what; runs none itself.
"""

import importlib.util
import json
import os
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from qlora_exp.deploy import export
from qlora_exp.deploy.load import GGUF_FILE, Saved
from qlora_exp.utils.errors import ConfigError


@dataclass(frozen=True)
class Server:
    """How to start one, and how to ask it."""

    command: list[str]
    environment: dict[str, str]
    url: str
    """Takes OpenAI's chat completions."""
    model: str
    """The model's name there."""

    @property
    def line(self) -> str:
        """What to type."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*settings, shlex.join(self.command)])

    @property
    def example(self) -> str:
        """A shell command that asks it something."""
        asked = {"model": self.model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64}
        return f"curl {self.url} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(asked))}"


def check(server: str, saved: Saved) -> None:
    """That the server is here, and can serve what was saved.

    Raises:
        ConfigError: it is not, or cannot; what to do instead.
    """
    is_gguf = (saved.folder / GGUF_FILE).is_file()
    if is_gguf != (server == "llama.cpp"):
        raise ConfigError(
            "--with llama.cpp: needs a GGUF file: qlora-exp export ... --to gguf, and serve that folder"
            if server == "llama.cpp"
            else f"{saved.folder}: a GGUF file is served --with llama.cpp"
        )
    missing = {
        "transformers": not importlib.util.find_spec("openai") and "pip install 'qlora-exp[serve]'",
        "vllm": not shutil.which("vllm") and "pip install vllm, in an environment of its own, and put it on the PATH",
        "llama.cpp": not shutil.which("llama-server") and "install llama.cpp, so that `llama-server` is found",
    }
    if how := missing.get(server):
        raise ConfigError(f"--with {server} needs it to be installed: {how}; --print shows its command")


def folder_of(saved: Saved, out: Path) -> Path:
    """The folder of a whole model to serve: an adapter is merged into `out` first, unless it was before.

    Raises:
        ConfigError: `out` holds something else, or the adapter cannot be merged.
        ModelError: base and adapter do not belong together, or a file is damaged.
    """
    if not saved.adapter:
        return saved.folder
    if not export.is_there(saved, out):
        export.export(saved, out)
    return out


def mlflow_model(folder: Path, made: Path) -> Path:
    """Write MLflow's model of the transformers folder, which `mlflow models serve` takes, to `made`, always anew."""
    import mlflow.transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # MLflow 3.17 takes no path of a folder with transformers 5, and asks the hub about a name that could be one there.
    folder = folder.resolve()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=False)
    components = {"model": model, "tokenizer": AutoTokenizer.from_pretrained(folder, trust_remote_code=False)}
    requirements = ["mlflow", "torch", "transformers", "accelerate"]
    shutil.rmtree(made, ignore_errors=True)
    mlflow.transformers.save_model(components, str(made), task="llm/v1/chat", pip_requirements=requirements)
    return made


def server(name: str, folder: Path, host: str, port: int, device: str = "auto") -> Server:
    """How the server `name` serves the model in `folder`."""
    chat = f"http://{host}:{port}/v1/chat/completions"
    binaries, where = Path(sys.executable).parent, ["--host", host, "--port", str(port)]
    offline = {"HF_HUB_OFFLINE": "1"}
    if name == "transformers":
        command = [str(binaries / "transformers"), "serve", str(folder), "--device", device, *where]
        return Server(command, offline, chat, str(folder))
    if name == "mlflow":
        command = [str(binaries / "mlflow"), "models", "serve", "-m", str(folder), "--env-manager", "local", *where]
        path = f"{binaries}{os.pathsep}{os.environ.get('PATH', '')}"  # it starts uvicorn by its name
        return Server(command, offline | {"PATH": path}, f"http://{host}:{port}/invocations", folder.name)
    if name == "vllm":
        return Server(["vllm", "serve", str(folder), *where], offline, chat, str(folder))
    return Server(["llama-server", "-m", str(folder / GGUF_FILE), *where], {}, chat, GGUF_FILE)


def commands(saved: Saved, out: Path, host: str, port: int) -> list[str]:
    """What to type for each server that takes a folder or a file: a comment, then commands, then a question."""
    if (saved.folder / GGUF_FILE).is_file():
        named = [("llama.cpp", server("llama.cpp", saved.folder, host, port))]
    else:
        folder = out if saved.adapter else saved.folder
        named = [(name, server(name, folder, host, port)) for name in ("transformers", "vllm")]
    if (without := adapter_on_vllm(saved, host, port)) is not None:
        named.append(("vllm, the adapter beside its base", without))
    merging = ["qlora-exp", "merge", saved.source, "--out", str(out)]
    merging += ["--uri", saved.tracking_uri] if saved.tracking_uri else []
    made = [shlex.join(merging)] if saved.adapter else []
    return [
        line for name, one in named for line in (f"# {name}", *([] if one is without else made), one.line, one.example)
    ]


def adapter_on_vllm(saved: Saved, host: str, port: int) -> Server | None:
    """How vLLM serves a LoRA adapter beside its base, without merging; None for what it does not take so."""
    config = saved.config
    settings = config.peft_settings
    if not saved.adapter or config.method.peft_type != "LORA" or settings.get("use_dora"):
        return None
    if config.model.model_name_or_path.startswith(("embedded:", "random:")):  # made here, known nowhere else
        return None
    name = saved.run_id or "adapter"
    rank = max([settings.get("r", 8), *settings.get("rank_pattern", {}).values()])
    command = ["vllm", "serve", config.model.model_name_or_path, "--enable-lora", "--max-lora-rank", str(rank)]
    command += ["--lora-modules", f"{name}={saved.folder.resolve()}", "--host", host, "--port", str(port)]
    template = saved.folder / "chat_template.jinja"
    if template.is_file():
        command += ["--chat-template", str(template.resolve())]
    return Server(command, {}, f"http://{host}:{port}/v1/chat/completions", name)
