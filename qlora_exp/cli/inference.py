"""`generate`, `chat` and `serve`: use a trained model."""

import argparse
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_exp.cli import ports
from qlora_exp.cli.parents import DEVICES, SOURCE, URI, Commands, add_command
from qlora_exp.deploy.formats import FIRST, SERVERS
from qlora_exp.utils.display import NEWLINES, say, shown, visible, visible_json
from qlora_exp.utils.errors import ConfigError, UserError
from qlora_exp.utils.files import check_source, replacing
from qlora_exp.utils.quiet import quiet

if TYPE_CHECKING:
    from qlora_exp.deploy.chat import ChatModel, Sampling


def add_parsers(commands: Commands) -> None:
    """Add the three commands."""
    device = argparse.ArgumentParser(add_help=False)
    device.add_argument("--device", choices=DEVICES, default="auto", help="device to run on; default: auto")
    sampling = argparse.ArgumentParser(add_help=False)
    adapter = "load another adapter of the same base model as NAME; SOURCE: RUN, MODEL or FOLDER; may be repeated"
    sampling.add_argument("--adapter", action="append", default=[], metavar="NAME=SOURCE", help=adapter)
    quantization = "quantization of the base model: nf4_double, int8, none, ...; default: as in training"
    sampling.set_defaults(less_memory=_LESS_MEMORY)
    sampling.add_argument("--quantization", metavar="NAME", help=quantization)
    sampling.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="most tokens of an answer; default: 256"
    )
    sampling.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="randomness; 0 (default): always the most likely token",
    )
    top_p = "sample only from the most likely tokens, with total probability P; 1 (default): from all"
    sampling.add_argument("--top-p", type=float, default=1.0, metavar="P", help=top_p)
    top_k = "sample only from the K most likely tokens; 0 (default): from all"
    sampling.add_argument("--top-k", type=int, default=0, metavar="K", help=top_k)
    penalty = "above 1: the model repeats itself less; default: 1 (no penalty)"
    sampling.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help=penalty)
    sampling.add_argument(
        "--seed", type=int, metavar="N", help="random seed of sampling; default: a different one each time"
    )

    parser = add_command(commands, "generate", generate, [SOURCE, URI, sampling, device])
    parser.add_argument("--prompt", metavar="TEXT", help="prompt to answer; the answer is printed")
    file = (
        "file of prompts, one per line; in .jsonl each line is an object with 'prompt' (and optionally 'input') or "
        "'messages', and optionally 'adapter', the NAME of an adapter"
    )
    parser.add_argument("--file", type=Path, metavar="FILE", help=file)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help=".jsonl file to write the answers to --file to; default: standard output",
    )

    parser = add_command(commands, "chat", chat, [SOURCE, URI, sampling, device])
    parser.add_argument("--system", metavar="TEXT", help="system message, if the model's prompt format has one")

    parser = add_command(commands, "serve", serve, [SOURCE, URI, sampling, device])
    engine = "what generates: transformers in this process (default), or another program, which is started"
    parser.add_argument("--with", dest="server", choices=SERVERS, default="transformers", help=engine)
    parser.add_argument("--print", action="store_true", help="only print the commands that start several servers")
    out = "folder to write the merged model to, for other programs; default: outputs/served/RUN_ID"
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=out)
    key = "environment variable with the API key that clients must send; default: none is needed"
    parser.add_argument("--api-key-env", metavar="NAME", help=key)
    parser.add_argument("--host", default="127.0.0.1", help="address to serve on; default: this machine only")
    parser.add_argument("--port", type=int, default=8000, help="port to serve on; default: 8000")
    names = "further name in the Host header of requests, such as that of a proxy; default: only names of this machine"
    parser.add_argument("--allowed-host", metavar="NAME", action="append", default=[], help=names)


_LESS_MEMORY = "less is taken with --quantization nf4_double, a smaller --max-new-tokens or --device cpu"


def generate(options: argparse.Namespace) -> None:
    """Answer a prompt, or each prompt of a file, with a trained model.

    examples:
      qlora-exp generate RUN_ID --prompt "How long does concrete need?"
      qlora-exp generate RUN_ID --file prompts.jsonl --out answers.jsonl
    """
    if (options.prompt is None) == (options.file is None):
        raise ConfigError("generate: give --prompt TEXT or --file FILE")
    if options.out is not None and not options.out.absolute().parent.is_dir():
        raise ConfigError(f"--out {options.out}: no folder {options.out.absolute().parent}")
    from tqdm import tqdm

    talker, sampling = _talker(options)
    from qlora_exp.deploy import chat as chatting

    if options.prompt is not None:
        talker.answer(chatting.asked(options.prompt), sampling, _print_at_once)
        print()
        return
    requests = [*chatting.read_requests(options.file)]
    for number, request in enumerate(requests, 1):  # report mistakes before hours of generation
        try:
            talker.encoded(request, sampling)
        except UserError as error:
            raise type(error)(f"{options.file}, request {number}: {error}") from error
    with nullcontext(sys.stdout) if options.out is None else replacing(options.out) as lines:
        for answered in tqdm(chatting.answers(talker, requests, sampling), total=len(requests), disable=None):
            print(visible_json(json.dumps(answered, ensure_ascii=False)), file=lines, flush=True)
    if options.out is not None:
        print(f"{len(requests)} answers in {options.out}")


_CHAT_HELP = (
    "/adapter NAME switches the adapter, /system TEXT starts over with a system message, /reset starts over, "
    "/exit, /quit or Ctrl-D ends"
)


def chat(options: argparse.Namespace) -> None:
    """Talk with a trained model in the terminal.

    Commands during the dialogue: /adapter NAME, /system TEXT, /reset, /exit or /quit.

    examples:
      qlora-exp chat RUN_ID
      qlora-exp chat RUN_ID --adapter other=OTHER_RUN_ID     compare two adapters
    """
    talker, sampling = _talker(options)
    from qlora_exp.deploy import chat as chatting

    adapter: str | None = None
    system: str | None = options.system
    messages: list[dict[str, str]] = []
    print(f"adapters: {', '.join(talker.saved)}. {_CHAT_HELP}", file=sys.stderr)
    while True:
        try:
            line = input(f"{adapter or ''}> " if sys.stdin.isatty() else "").strip()
            if not sys.stdin.isatty():
                print(shown(f"{adapter or ''}> {line}"), file=sys.stderr)
        except EOFError:
            return
        word, _, rest = line.partition(" ")
        try:
            if word in ("/exit", "/quit"):
                return
            if word == "/adapter":
                talker.named(rest.strip())
                adapter, messages = rest.strip(), []
            elif word in ("/reset", "/system"):
                system, messages = rest.strip() or (None if word == "/system" else system), []
            elif word.startswith("/"):
                print(_CHAT_HELP, file=sys.stderr)
            elif word:
                opening = [{"role": "system", "content": system}] if system else []
                asked = [*messages, {"role": "user", "content": line}]
                request = chatting.Request(opening + asked, adapter=adapter)
                answer = talker.answer(request, sampling, _print_at_once)
                print(flush=True)
                messages = [*asked, {"role": "assistant", "content": answer}]
        except UserError as error:  # report it, and continue the dialogue
            print(f"error: {shown(error, keep=NEWLINES)}", file=sys.stderr)


def _print_at_once(text: str) -> None:
    print(visible(text, keep=NEWLINES), end="", flush=True)


def _talker(options: argparse.Namespace) -> "tuple[ChatModel, Sampling]":
    quiet()
    sources = {FIRST: options.source}
    for word in options.adapter:
        name, equals, source = word.partition("=")
        if not equals or not name or name in sources:
            raise ConfigError(
                f"--adapter {word}: must be NAME=SOURCE, and each NAME used once ('{FIRST}' is the first SOURCE)"
            )
        sources[name] = source
    for source in sources.values():  # before the slow imports
        check_source(source)
    from qlora_exp.deploy import chat as chatting

    # Wrong values are reported before anything is loaded.
    sampling = chatting.Sampling(**{name: getattr(options, name) for name in chatting.Sampling.__dataclass_fields__})
    print("loading the model ...", file=sys.stderr, flush=True)
    return chatting.load_chat_model(sources, options.uri, options.device, options.quantization), sampling


def serve(options: argparse.Namespace) -> None:
    """Serve a trained model and further adapters to OpenAI's clients.

    A request names the adapter as its `model`: 'default', the NAME of an --adapter, or 'base'.
    Sampling is as the options say where a request does not. Ctrl-C ends the server.

    examples:
      qlora-exp serve RUN_ID --port 8001
      qlora-exp serve RUN_ID --adapter other=OTHER_RUN_ID
      qlora-exp serve RUN_ID --print                     commands for several servers
    """
    quiet()
    check_source(options.source)
    if options.print or options.server != "transformers":
        _serve_elsewhere(options)
        return
    if options.out is not None:
        raise ConfigError("--out: only for other programs (--with vllm): here nothing is merged")
    key = None if options.api_key_env is None else os.environ.get(options.api_key_env)
    if options.api_key_env is not None and not key:
        raise ConfigError(f"--api-key-env {options.api_key_env}: this environment variable is not set")
    if wild := [name for name in options.allowed_host if "*" in name or "/" in name]:
        raise ConfigError(f"--allowed-host {wild[0]}: not a name as in the header Host, such as models.example.org")
    ports.require_free(options.host, options.port)
    talker, sampling = _talker(options)
    from qlora_exp.deploy.serving import commands, server

    endpoint = server.Endpoint(talker, sampling, key)
    example = commands.own_server(talker.saved[FIRST], options.host, options.port).example
    header = f' -H "Authorization: Bearer ${options.api_key_env}"' if key else ""
    say(f"models: {', '.join(endpoint.names)}. Ctrl-C ends the server. To try it:")
    print(visible(f"{example}{header}"), flush=True)  # the variable's name is no secret
    server.run(endpoint, options.host, options.port, options.allowed_host)


_HERE_ONLY: dict[str, object] = {
    "adapter": [],
    "quantization": None,
    "max_new_tokens": 256,
    "temperature": 0.0,
    "top_p": 1.0,
    "top_k": 0,
    "repetition_penalty": 1.0,
    "seed": None,
    "device": "auto",
    "api_key_env": None,
    "allowed_host": [],
}
"""Options that other programs do not get, with their defaults."""


def _serve_elsewhere(options: argparse.Namespace) -> None:
    """Replace this process by another server, or only print the commands."""
    if used := [name for name, default in _HERE_ONLY.items() if getattr(options, name) != default]:
        raise ConfigError(
            f"--{used[0].replace('_', '-')}: only for a model that is served by this process, not for other servers "
            "and --print"
        )
    from qlora_exp.deploy import load
    from qlora_exp.deploy.serving import commands

    saved = load.find(options.source, options.uri, "cpu")
    out = options.out or Path("outputs") / "served" / (saved.run_id or saved.folder.resolve().parent.name)
    if options.print:
        say(*commands.commands(saved, out, options.host, options.port))
        return
    commands.check(options.server, saved)
    ports.require_free(options.host, options.port)
    folder, stop = commands.folder_of(saved, out), commands.stop_of(saved)
    server = commands.server(options.server, folder, options.host, options.port, stop)
    say(
        f"{options.server} will serve {folder} at {server.url} in a moment (Ctrl-C stops it). To try it:",
        server.example,
    )
    sys.stdout.flush()
    # Replace this process by the server, so that whatever ends the process ends the server.
    os.execvpe(server.command[0], server.command, dict(os.environ) | server.environment)
