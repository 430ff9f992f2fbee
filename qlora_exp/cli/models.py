"""What the commands about trained models do: each takes its options, prints, and raises what the user can mend.

Imports nothing heavy until a command must.
"""

import argparse
import json
import logging
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_exp.cli.commands import is_free
from qlora_exp.utils.errors import ConfigError, UserError
from qlora_exp.utils.quiet import quiet
from qlora_exp.utils.secrets import redact

if TYPE_CHECKING:
    from qlora_exp.deploy.chat import Sampling, Talker


def export(options: argparse.Namespace) -> None:
    """What a run trained, in the form in which it is to be used."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    quiet()
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # GPTQModel's layers would be compiled, one by one
    from qlora_exp.config import untrusted
    from qlora_exp.config.untrusted import changed
    from qlora_exp.deploy import export as exporting
    from qlora_exp.deploy import load

    saved = load.find(options.source, options.uri, "cpu")
    rows_of = None
    if options.changes:
        rows_of = changed(saved.config.model_dump(mode="json"), untrusted.given(options.changes), "the record")
    made = exporting.export(saved, options.out, options.to, options.dtype, options.base, options.type, rows_of)
    print(f"base    {made.base}; {made.weights}")
    print(
        f"check   logits differ by {made.max_logit_difference:.2g} at most (they reach {made.max_logit:.3g}), KL "
        f"{made.mean_kl:.2g} nats a token, the same first choice after {made.same_first_choice:.1%} of tokens"
    )
    print(f"answer  {made.same_answer_tokens} of {made.answer_tokens} tokens as before: {made.answer!r}")
    print(f"folder  {made.folder} ({made.bytes / 1e6:,.1f} MB)")


def generate(options: argparse.Namespace) -> None:
    """Answers to one prompt or to a file of them."""
    if (options.prompt is None) == (options.file is None):
        raise ConfigError("generate: give --prompt TEXT or --file FILE")
    if options.out is not None and not options.out.absolute().parent.is_dir():
        raise ConfigError(f"--out {options.out}: no folder {options.out.absolute().parent}")
    from tqdm import tqdm

    talker, sampling = _talker(options)
    from qlora_exp.deploy import chat as generation

    if options.prompt is not None:
        talker.answer(generation.asked(options.prompt), sampling, _print_at_once)
        print()
        return
    requests = [*generation.read_requests(options.file)]
    for number, request in enumerate(requests, 1):  # what cannot be asked is told before hours of answers
        try:
            talker.encoded(request, sampling)
        except UserError as error:
            raise type(error)(f"{options.file}, request {number}: {error}") from error
    part = None if options.out is None else options.out.with_name(f"{options.out.name}.part")
    with nullcontext(sys.stdout) if part is None else part.open("w", encoding="utf-8") as lines:
        for answered in tqdm(generation.answers(talker, requests, sampling), total=len(requests), disable=None):
            print(json.dumps(answered, ensure_ascii=False), file=lines, flush=True)
    if part is not None:
        part.rename(options.out)
        print(f"{len(requests)} answers in {options.out}")


_CHAT_HELP = "/adapter NAME switches, /system TEXT begins anew with it, /reset begins anew, /exit or Ctrl-D ends"


def chat(options: argparse.Namespace) -> None:
    """A conversation on the terminal."""
    talker, sampling = _talker(options)
    from qlora_exp.deploy import chat as generation

    adapter: str | None = None
    system: str | None = options.system
    messages: list[dict[str, str]] = []
    print(f"adapters: {', '.join(talker.saved)}. {_CHAT_HELP}", file=sys.stderr)
    while True:
        try:
            said = input(f"{adapter or ''}> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        word, _, rest = said.strip().partition(" ")
        try:
            if word == "/exit":
                return
            if word == "/adapter":
                talker.named(rest.strip())
                adapter, messages = rest.strip(), []
            elif word in ("/reset", "/system"):
                system, messages = rest.strip() or (None if word == "/system" else system), []
            elif word.startswith("/"):
                print(_CHAT_HELP, file=sys.stderr)
            elif word:
                begin = [{"role": "system", "content": system}] if system else []
                asked = [*messages, {"role": "user", "content": said.strip()}]
                answer = talker.answer(generation.Request(begin + asked, adapter=adapter), sampling, _print_at_once)
                print(flush=True)
                messages = [*asked, {"role": "assistant", "content": answer}]
        except UserError as error:  # the conversation goes on
            print(f"error: {redact(str(error))}", file=sys.stderr)


def _print_at_once(text: str) -> None:
    print(text, end="", flush=True)


def _talker(options: argparse.Namespace) -> "tuple[Talker, Sampling]":
    quiet()
    sources = {"default": options.source}
    for given in options.adapter:
        name, found, source = given.partition("=")
        if not found or not name or name in sources:
            raise ConfigError(f"--adapter {given}: NAME=SOURCE, with a name that is not taken")
        sources[name] = source
    from qlora_exp.deploy import chat as generation

    chosen = {name: getattr(options, name) for name in generation.Sampling.__dataclass_fields__}
    sampling = generation.Sampling(**chosen)
    sampling.settings([0], 0)  # refused before anything is loaded
    return generation.open_talker(sources, options.uri, options.device, options.quantization), sampling


def serve(options: argparse.Namespace) -> None:
    """A server in place of this process, or the commands of all that could be."""
    quiet()
    from huggingface_hub.constants import HF_HUB_CACHE

    from qlora_exp.deploy import load
    from qlora_exp.deploy import serve as serving

    saved = load.find(options.source, options.uri, "cpu")
    out = options.out or Path("outputs") / "served" / (saved.run_id or saved.folder.resolve().parent.name)
    if options.print:
        print("\n".join(serving.commands(saved, out, options.host, options.port)))
        return
    serving.check(options.server, saved)
    is_free(options.host, options.port)
    folder = serving.folder_of(saved, out)
    if options.server == "mlflow":
        folder = serving.mlflow_model(folder, out.with_name(f"{out.name}.mlflow"))
    server = serving.server(options.server, folder, options.host, options.port, options.device)
    print(f"{options.server} serves {folder} at {server.url} in a while (Ctrl-C ends it). Ask it:\n{server.example}")
    sys.stdout.flush()
    Path(HF_HUB_CACHE).mkdir(parents=True, exist_ok=True)  # transformers' `/v1/models` fails where there is none
    # In place of this process, so that whatever ends it ends the server.
    os.execvpe(server.command[0], server.command, dict(os.environ) | server.environment)


def register(options: argparse.Namespace) -> None:
    """A run's model in MLflow's registry, with its card; on the hub too, if asked."""
    quiet()
    if options.card is not None and not options.card.absolute().parent.is_dir():
        raise ConfigError(f"--card {options.card}: no folder {options.card.absolute().parent}")
    from qlora_exp.deploy import registry

    made, card = registry.register(options.uri, options.run, options.name, options.alias)
    print(f"version  {made.version} of {made.name}\nload     qlora_exp.load({made.uri!r})")
    if options.card is not None:
        options.card.write_text(card, "utf-8")
        print(f"card     {options.card}")
    if options.push is not None:
        print(f"hub      {registry.push(options.uri, made.uri, options.push, card, not options.public)}")


def deployment_gap(options: argparse.Namespace) -> None:
    """What each form of a trained model loses of its quality, on the same rows."""
    quiet()
    from rich.console import Console

    from qlora_exp.config import untrusted
    from qlora_exp.deploy import load
    from qlora_exp.results import records, reproduce
    from qlora_exp.studies import deployment_gap as deployment
    from qlora_exp.tracking import mlflow_store
    from qlora_exp.utils.files import write_atomically
    from qlora_exp.utils.tables import print_table

    record = reproduce.one_record(options.uri, options.run)
    config = reproduce.recorded_config(record, untrusted.given(options.changes), options.uri)
    saved = load.find(record.run_id, options.uri, "cpu")
    forms = deployment.forms_of(config, saved.adapter, options.forms.split(",") if options.forms else ())
    out = options.out or Path("outputs") / "deployment" / record.run_id
    out.mkdir(parents=True, exist_ok=True)
    with Console(stderr=True).status("") as status:
        found = deployment.study(record.run_id, options.uri, config, forms, out, status.update)
    for headings, rows in deployment.tables(found):
        print_table(f"{record.name}, on the same held-out rows", headings, rows)
    print(
        "change: from the model as it was trained, with 95 % of chance over these rows. MB: all weights. MiB: memory "
        "of generation beyond the imports. GGUF: loss of its weights in transformers, the rest of llama.cpp"
    )
    told = deployment.told(found, record.run_id)
    file = out / "deployment_gap.json"
    write_atomically(file, json.dumps(told, indent=1, ensure_ascii=False))
    with records.explained():
        mlflow_store.client(options.uri).log_artifact(record.run_id, str(file))
    print(f"file  {file}, kept with run {record.run_id} in MLflow too; each form is in its folder beside it")
