"""Feed damaged and hostile inputs to everything that reads what a stranger wrote, and count how it ends.

    nox -s fuzz -- 10                        # ten minutes
    nox -s fuzz -- --replay FOLDER           # one input again, with its traceback

Valid bundles, output folders, adapters, models, GGUF files, configs and chat templates are changed at random: bytes,
the values of JSON and YAML, the keys. Each is read in a fork with limits of time and memory. Expected: it is read, or
refused with an error of this program (`UserError`); nothing is run, nothing outside of its folder is opened. Inputs
that end otherwise are written to a folder, and the exit status is 1.
"""

import argparse
import json
import os
import pickle
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import chdir
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from qlora_exp.config.hydra_compose import compose
from qlora_exp.config.untrusted import changed, plain_yaml
from qlora_exp.config.values import to_yaml
from qlora_exp.deploy import chat, export, load
from qlora_exp.recipe.finetune import run
from qlora_exp.results import bundle, reproduce
from qlora_exp.tracking import journal, mlflow_store, recovery
from qlora_exp.utils.errors import UserError
from qlora_exp.utils.quiet import quiet
from qlora_exp.utils.tables import print_table
from qlora_exp.utils.units import MIB

SECONDS, MIB_LIMIT = 45, 4096
"""Limits of one try. Attaching an adapter alone may take 30 seconds."""
KIND_FILE = "kind.txt"
_RUN = [
    "device=cpu", "model=tiny_llama", "dataset.max_train_rows=16", "dataset.max_eval_rows=4", "training.max_steps=2",
    "training.per_device_train_batch_size=2", "training.eval_strategy=no", "unrelated=none", "tracking.plan=false",
    "evaluation.generate_rows=1", "evaluation.max_new_tokens=4",
]  # fmt: skip
TRAINED = {
    "adapter": ["method=lora"],
    "chat adapter": ["method=lora", "dataset.format=chat"],
    "prefix": ["method=prefix_tuning"],
    "model": ["method=full", "tracking.log_full_model=true"],
}
KINDS = ["config", "bundle", "zip", "journal", "gguf", *TRAINED]
_EVENTS = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect")
_OWN_PROGRAMS = ("git", "uname", "lscpu", "ldconfig")
"""Programs that this project and Python start themselves."""


@dataclass(frozen=True)
class Kind:
    """A kind of input: a folder with a valid one, and what reads it."""

    name: str
    folder: Path
    read: Callable[[Path], Any]


@dataclass(frozen=True)
class Outcome:
    """How a try ended."""

    failure: str
    """What was wrong; empty if the input was read or refused."""
    refused: bool = False
    seconds: float = 0.0
    mib: int = 0


def hostile_values(outside: Path) -> list[Any]:
    """List values that are put in the place of others; `outside` is a folder that nothing may touch."""
    touch = f"__import__('os').system('touch {outside}/canary')"
    return [
        None, True, False, 0, -1, 1, 2, 3.5, 255, 10**4, 2**31, 2**32, 2**53, 2**63, 2**64, 10**30, 10**400, 1e308,
        -1e308, float("nan"), float("inf"), "", " ", "x", "x" * 5000, "\x00", "\x1b[2J", "\u202e", "{", "[]", "null",
        "1e9", "none", "auto", [], {}, [[]], [{}], {"": None}, [None], [0] * 3000, {"a": {"a": {"a": []}}}, ["x"] * 3,
        list(range(50)), "(a+)+$", "(([a-z._0-9])+)+Q", ".*.*.*.*.*.*Q", {"(([a-z._0-9])+)+Q": 4}, "all-linear", "[",
        "(?P<", "\\", f"{outside}/secret", f"file://{outside}/secret", "../secret", "../../secret", "~/x",
        "~nobody/x", "/dev/zero", "/etc/passwd", "hf://a/b", "s3://a/b", "http://127.0.0.1:9/x", "evil/repo", "a/b/c",
        "reasoning_gym:string_insertion", "embedded:x", "random:gpt2", touch, {"_target_": "os.system"},
        "!!python/object/apply:os.system ['true']", "os.system", "{{ 10 ** (10 ** 9) }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ ('x' * 3000000000) | length }}", "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% include 'x' %}", "LORA", "PREFIX_TUNING", "XLORA", "llama", "gpt2", "qwen2", "mixtral", "mamba", "EVIL",
        "pissa_niter_99999999", "bitsandbytes",
    ]  # fmt: skip


HOSTILE_KEYS = [
    "trust_remote_code", "auto_map", "auto_mapping", "_target_", "attn_implementation", "quantization_config",
    "peft_type", "r", "target_modules", "rank_pattern", "layer_replication", "megatron_core",
    "tokenizer_name_or_path", "tokenizer_file", "vocab_file", "fast_tokenizer_files", "tokenizer_class",
    "chat_template", "num_hidden_layers", "num_labels", "layer_types", "rope_parameters", "num_beams",
    "custom_generate", "dtype", "model_type", "architectures", "base_model_name_or_path", "init_lora_weights",
    "modules_to_save", "trainable_token_indices", "eos_token_id", "pad_token_id", "vocab_size", "hidden_size",
    "text_config", "truncation", "padding", "normalizer", "pre_tokenizer", "added_tokens", "drop_matching",
    "lm_eval_include_path", "uri", "timestamp",
]  # fmt: skip


# Changes of an input


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of each value in a tree of dictionaries and lists."""
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*at, key))


def replaced(value: Any, at: tuple[Any, ...], change: Callable[[Any], Any]) -> Any:
    """Return the tree with the value at a path changed."""
    if not at:
        return change(value)
    copy: Any = dict(value) if isinstance(value, dict) else list(value)
    copy[at[0]] = replaced(copy[at[0]], at[1:], change)
    return copy


def change_tree(data: st.DataObject, tree: Any, hostile: list[Any]) -> Any:
    """Replace, remove, add or repeat one or two values."""
    for _ in range(data.draw(st.integers(1, 2))):
        paths = [*places(tree)]
        short = [path for path in paths if len(path) <= 2]
        at = data.draw(st.sampled_from(short if data.draw(st.booleans()) else paths))
        how = data.draw(st.sampled_from(["replace", "replace", "add", "remove", "repeat"]))
        key, new = data.draw(st.sampled_from(HOSTILE_KEYS)), data.draw(st.sampled_from(hostile))
        tree = replaced(tree, at, partial(change_value, how, key, new))
    return tree


def change_value(how: str, key: str, new: Any, old: Any) -> Any:
    """Return what takes the place of a value: `new`, or something made of the old one."""
    if how == "repeat":
        return [old] * 200
    if isinstance(old, dict) and how == "add":
        return {**old, key: new}
    if isinstance(old, dict) and how == "remove" and old:
        gone = [*old][len(str(new)) % len(old)]
        return {name: item for name, item in old.items() if name != gone}
    if isinstance(old, list) and how == "remove":
        return old[:-1]
    return new


def change_bytes(data: st.DataObject, content: bytes) -> bytes:
    """Change, cut, insert or repeat bytes, most often in the first thousand, where formats have their headers."""
    new = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        most = len(new) if data.draw(st.booleans()) else min(len(new), 1000)
        at = data.draw(st.integers(0, max(most - 1, 0)))
        extreme = data.draw(st.sampled_from([0, 1, 2**15, 2**31 - 1, 2**32 - 1, 2**40, 2**60, 2**63, 2**64 - 1]))
        match data.draw(st.sampled_from(["flip", "number", "cut", "insert", "repeat", "remove"])):
            case "flip":
                new[at : at + 1] = bytes([data.draw(st.integers(0, 255))])
            case "number":
                new[at : at + 8] = extreme.to_bytes(8, "little")
            case "cut":
                del new[at:]
            case "insert":
                new[at:at] = data.draw(
                    st.sampled_from([b"\x00" * 20, b"\xff\xfe", b"[" * 5000, b'"', b"}", b"\n", b"\x80\x04\x95"])
                )
            case "repeat":
                new[at:at] = new[at : at + 500] * 20
            case _:
                del new[at : at + data.draw(st.integers(1, 50))]
    return bytes(new)


def change(data: st.DataObject, file: Path, hostile: list[Any]) -> None:
    """Change a file in place, by its structure or its bytes."""
    content = file.read_bytes()
    structured = data.draw(st.integers(0, 3)) > 0
    if structured and file.suffix == ".json":
        file.write_text(json.dumps(change_tree(data, json.loads(content), hostile)), "utf-8")
    elif structured and file.suffix in (".yaml", ".yml"):
        file.write_text(yaml.safe_dump(change_tree(data, yaml.safe_load(content), hostile)), "utf-8", "replace")
    elif structured and file.suffix == ".jsonl":
        lines = content.splitlines()
        place = data.draw(st.integers(0, len(lines) - 1))
        lines[place] = json.dumps(change_tree(data, json.loads(lines[place]), hostile)).encode()
        file.write_bytes(b"\n".join(lines) + b"\n")
    elif structured and file.suffix == ".jinja":
        at = data.draw(st.integers(0, len(content)))
        new = data.draw(st.sampled_from([value for value in hostile if isinstance(value, str)])).encode(
            "utf-8", "replace"
        )
        file.write_bytes(content[:at] + new + content[at:])
    elif structured and file.suffix == ".safetensors":
        size = int.from_bytes(content[:8], "little")
        header = json.dumps(change_tree(data, json.loads(content[8 : 8 + size]), hostile)).encode()
        file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])
    else:
        file.write_bytes(change_bytes(data, content))


# Reading an input


def read_bundle(path: Path) -> None:
    """Do what `reproduce --check-only` and `compare` do with a bundle."""
    archive = path / "bundle.zip"
    record = reproduce.find_run(None, str(archive if archive.is_file() else path))
    _ = (
        record.losses,
        record.answers,
        record.unrelated_losses,
        record.lm_eval,
        record.curve("train/loss"),
        record.seed_losses(),
    )
    config = reproduce.recorded_config(record, {}, None)
    print("\n".join(reproduce.differences(record, config)).encode("utf-8"))


def read_config(path: Path) -> None:
    """Do what every command does with a recorded config."""
    values = plain_yaml((path / "qlora_exp.yaml").read_text("utf-8", "replace"), "the config")
    if isinstance(values, dict):
        changed(values, {}, "the config")


def read_model(path: Path) -> None:
    """Do what `generate` does with a saved folder."""
    model = chat.load_chat_model({"default": str(path)}, device="cpu")
    model.answer(chat.asked("How long?"), chat.Sampling(max_new_tokens=2))


def read_journal(path: Path) -> None:
    """Do what `sync` does with an output folder."""
    uri = f"sqlite:///{path / 'store.db'}"
    if not journal.is_delivered(path, uri) and not journal.is_locked(path):
        recovery.finish(path, "killed", "its process is gone", uri)


def make_corpus(folder: Path, chosen: set[str]) -> list[Kind]:
    """Make a valid input of each kind; for most of them tiny adapters and a tiny model are trained."""
    (folder / "config").mkdir()
    (folder / "config" / journal.CONFIG_FILE).write_text(to_yaml(compose([*_RUN, "method=lora"])), "utf-8")
    kinds = [Kind("config", folder / "config", read_config)]
    if chosen == {"config"}:
        return kinds
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    trained = {name: run(compose([*_RUN, f"tracking.uri={uri}", *TRAINED[name]]), folder / name) for name in TRAINED}
    record = reproduce.find_run(uri, str(trained["adapter"].run_id))
    for name in ("zip", "journal"):
        (folder / name).mkdir()
    bundle.write(record, folder / "bundle")
    bundle.write(record, folder / "zip" / "bundle.zip")
    export.export(load.find(str(folder / "adapter" / "model"), uri, "cpu"), folder / "gguf", "gguf")
    for file in (journal.FILE, journal.CONFIG_FILE):
        shutil.copy(folder / "adapter" / file, folder / "journal")
    mlflow_store.client(f"sqlite:///{folder / 'journal' / 'store.db'}")
    read = {"bundle": read_bundle, "zip": read_bundle, "journal": read_journal, "gguf": read_model}
    kinds += [Kind(name, folder / name, reader) for name, reader in read.items()]
    kinds += [Kind(name, folder / name / "model", read_model) for name in TRAINED]
    return [kind for kind in kinds if kind.name in chosen]


def attempt(kind: Kind, path: Path, outside: Path, show: bool = False) -> Outcome:
    """Read an input in a fork with limits, and say how it ended."""
    begin = time.monotonic()
    reader, writer = os.pipe()
    sys.stdout.flush()
    if not (child := os.fork()):
        os.close(reader)
        try:
            os.write(writer, pickle.dumps(_in_fork(kind, path, outside, show)))
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        if not select.select([pipe], [], [], SECONDS)[0]:
            os.kill(child, signal.SIGKILL)
        reply = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    seconds = time.monotonic() - begin
    if not reply:
        return Outcome(
            f"more than {SECONDS} seconds" if seconds >= SECONDS else f"ended by signal {-status}", False, seconds
        )
    failure, refused, mib = pickle.loads(reply)
    if (outside / "canary").exists():
        failure = (outside / "canary").read_text("utf-8") or "the canary was created"
        (outside / "canary").unlink()
    return Outcome(failure, refused, seconds, mib)


def _in_fork(kind: Kind, path: Path, outside: Path, show: bool) -> tuple[str, bool, int]:
    used = int(Path("/proc/self/statm").read_text("utf-8").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MIB_LIMIT * MIB, used + MIB_LIMIT * MIB))
    if not show:
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
    os.chdir(path)
    canary = outside / "canary"

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]) == str(outside / "secret"):
            canary.write_text("a file outside was opened", "utf-8")
        started = str(arguments[0]).rpartition("/")[2] if event in _EVENTS else None
        if started is not None and not started.startswith(_OWN_PROGRAMS):
            canary.write_text(f"{event} {arguments}", "utf-8")

    sys.addaudithook(watch)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    failure, refused = "", False
    try:
        kind.read(path)
    except UserError as error:
        refused = True
        if show:
            print(f"refused: {error}")
    except BaseException as error:  # whatever it is, it is no clear line for a user
        failure = "".join(traceback.format_exception(error))
    return failure, refused, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024


def changed_input(data: st.DataObject, kind: Kind, path: Path, hostile: list[Any]) -> None:
    """Copy a valid input and change one or two of its files."""
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(kind.folder, path)
    files = sorted(
        file for file in path.rglob("*") if file.is_file() and file.suffix != ".db" and "lock" not in file.name
    )
    archive = path / "bundle.zip"
    if archive.is_file() and data.draw(st.booleans()):  # a file in the archive instead of the archive's own bytes
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(path / "inside")
        inside = sorted(file for file in (path / "inside").rglob("*") if file.is_file())
        change(data, data.draw(st.sampled_from(inside)), hostile)
        shutil.make_archive(str(path / "bundle"), "zip", path / "inside")
        return
    for file in data.draw(st.lists(st.sampled_from(files), min_size=1, max_size=2, unique=True)):
        change(data, file, hostile)


def fuzz(kinds: list[Kind], folder: Path, failures: Path, seconds: float, start: int = 0) -> bool:
    """Try changed inputs of all kinds in turn; print what happened; return whether all ended well."""
    outside, path = folder / "outside", folder / "try" / "input"
    outside.mkdir()
    (outside / "secret").write_text("{}", "utf-8")
    hostile = hostile_values(outside)
    counts: dict[str, Counter[str]] = {kind.name: Counter() for kind in kinds}
    slowest = dict.fromkeys(counts, 0.0)
    largest = dict.fromkeys(counts, 0)
    until = time.monotonic() + seconds

    def tries(data: st.DataObject, kind: Kind) -> None:
        changed_input(data, kind, path, hostile)
        if time.monotonic() > until:  # what is drawn must not depend on the time
            return
        outcome = attempt(kind, path, outside)
        counts[kind.name]["failed" if outcome.failure else "refused" if outcome.refused else "read"] += 1
        slowest[kind.name] = max(slowest[kind.name], outcome.seconds)
        largest[kind.name] = max(largest[kind.name], outcome.mib)
        if outcome.failure:
            kept = failures / f"{kind.name.replace(' ', '_')}-{sum(counts[kind.name].values())}"
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(path, kept)
            (kept / KIND_FILE).write_text(f"{kind.name}\n{outcome.failure}", "utf-8", "replace")
            print(f"FAILED {kept}: {outcome.failure.strip().splitlines()[-1][:200]}", flush=True)

    number = start
    while time.monotonic() < until:
        for kind in kinds:
            number += 1
            options = settings(max_examples=20, database=None, deadline=None, phases=[Phase.generate],
                               suppress_health_check=[*HealthCheck])  # fmt: skip
            seed(number)(options(given(st.data(), st.just(kind))(tries)))()
    rows = [
        [name, *(str(count[end]) for end in ("read", "refused", "failed")), f"{slowest[name]:.1f}", str(largest[name])]
        for name, count in counts.items()
    ]
    print_table("tries", ["kind", "read", "refused", "failed", "most seconds", "most MiB"], rows)
    return not any(count["failed"] for count in counts.values())


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("minutes", nargs="?", type=float, default=5.0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="kinds of input; default: all")
    parser.add_argument("--seed", type=int, default=0, help="start of the random numbers; default: 0")
    parser.add_argument("--failures", type=Path, default=Path("outputs/fuzz"), help="folder for inputs that fail")
    parser.add_argument("--replay", type=Path, metavar="FOLDER", help="read one input again")
    options = parser.parse_args()
    quiet()
    failures, replay = options.failures.absolute(), options.replay and options.replay.absolute()
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        kinds = make_corpus(Path(folder), set(options.kinds))
        if replay is None:
            sys.exit(not fuzz(kinds, Path(folder), failures, 60 * options.minutes, options.seed))
        name = (replay / KIND_FILE).read_text("utf-8").splitlines()[0]
        outside = Path(folder, "outside")
        outside.mkdir()
        outcome = attempt(next(kind for kind in kinds if kind.name == name), replay, outside, show=True)
        print(outcome.failure or f"no failure; {outcome.seconds:.1f} s, {outcome.mib} MiB")
        sys.exit(bool(outcome.failure))


if __name__ == "__main__":
    main()
