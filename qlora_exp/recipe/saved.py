"""Read what earlier runs saved: the config of a saved model, and the adapter that this run trains on from.

What was recorded is only data: nothing in it can make code run.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_exp.config.schema import Config
from qlora_exp.config.tables import compatibility
from qlora_exp.config.tables.peft_methods import moves_base_weights
from qlora_exp.config.untrusted import plain_yaml
from qlora_exp.config.validate import from_dict
from qlora_exp.data.prompts import chat_template
from qlora_exp.models import adapters
from qlora_exp.models.base import Tokenizer, skeleton
from qlora_exp.models.builtin import PREFIXES
from qlora_exp.models.files import GGUF_FILE, NO_PICKLE, check_place, exported, read_json
from qlora_exp.models.targets import linear_layers, shortest_names
from qlora_exp.tracking import logged_models, run_key
from qlora_exp.tracking.journal import CONFIG_FILE
from qlora_exp.utils.digests import file_digest
from qlora_exp.utils.errors import ConfigError, ModelError

_WEIGHTS = "adapter_model.safetensors"
_CHANGED_AT_SAVING = ("r", "lora_alpha", "rank_pattern", "alpha_pattern")
"""Settings of LoRA that differ in what is saved of an initialization that moved a part of the base (`lora_init`)."""
_CHOSEN_FROM_ROWS = ("rank_pattern", "alpha_pattern")
"""Settings of LoRA that EVA chooses."""


def saved_config(
    source: str, folder: Path, device: str = "auto", with_places: Callable[[Any], Any] = lambda values: values
) -> Config:
    """Return the config that a run saved with its adapter or model, without what could run its author's code.

    Args:
        source: what the user named, for messages.
        folder: folder of the adapter or model.
        device: device of the returned config.
        with_places: function that replaces paths in the recorded values by those of this machine.

    Raises:
        ModelError: no run saved this, it is not complete, or its config is damaged or of another version.
    """
    adapter = (folder / "adapter_config.json").is_file()
    names = (_WEIGHTS,) if adapter else ("model*.safetensors", GGUF_FILE)  # never a pickle
    if not (folder / CONFIG_FILE).is_file():
        kind = "adapters" if adapter else "models"
        raise ModelError(
            f"{source}: not a model that a run saved: it has no {CONFIG_FILE}; {kind} that were made with other "
            "programs are not taken, as nothing says in which format they are prompted"
        )
    if not any(list(folder.glob(name)) for name in names):
        if any(folder.glob("*model*.bin")):
            raise ModelError(f"{source}: {NO_PICKLE}")
        raise ModelError(f"{source}: not a complete model: it has no {' or '.join(names)}")
    try:
        recorded = with_places(plain_yaml((folder / CONFIG_FILE).read_text("utf-8"), CONFIG_FILE))
        # A config from somebody else must not run their code: neither the model's own code nor a kernel of the hub.
        recorded["model"] |= {"trust_remote_code": False, "attn_implementation": None}
        # Settings of a step, which another device may not have, are no part of a model.
        recorded["training"] |= {"resume_from_checkpoint": None, "bf16": "auto", "fp16": "auto"}
        recorded["training"] |= {"activation_offloading": False, "sft_config": {}}
        recorded["tracking"] = {}
    except (ConfigError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ModelError(f"{source}: {CONFIG_FILE} is damaged: {error}") from error
    try:
        with compatibility.ignored():  # it was trained, so what would be refused now worked then
            config = from_dict(recorded | {"device": device})
    except ConfigError as error:
        raise ModelError(f"{source}: its config does not match this version of qlora_exp: {error}") from error
    for section, part in {"dataset": config.dataset, **config.sections_of_rows}.items():
        if part.format == "auto" and (part.paths or section == "dataset"):  # runs record what was recognized
            raise ModelError(f"{source}: {CONFIG_FILE} is damaged: {section}.format=auto does not say how it is read")
    return config


@dataclass(frozen=True)
class FirstAdapter:
    """The adapter that a run trains on from."""

    folder: Path
    run_id: str | None
    """Id of the run that saved it; None if unknown."""
    recorded: Config
    """Config of that run."""
    ranks: dict[str, Any]
    """Settings of PEFT that its initialization chose, which are not in a run's config."""

    @property
    def digest(self) -> str:
        """SHA-256 of the file with its weights."""
        return file_digest(self.folder / _WEIGHTS)

    def differences(self, config: Config, tokenizer: Tokenizer) -> Iterator[str]:
        """Yield what this run has otherwise than the run that saved the adapter, and may have otherwise."""
        then, now = self.recorded, config
        if then.quantization != now.quantization:
            yield (
                f"quantization: its base was stored as {then.quantization.name}, this run's is stored as "
                f"{now.quantization.name}, so its outputs at the start differ a little"
            )
        prompts = [(data.system_message, chat_template(data, tokenizer)) for data in (then.dataset, now.dataset)]
        if then.dataset.format != now.dataset.format or prompts[0] != prompts[1]:
            formats = then.dataset.format, now.dataset.format
            what = "another system message or template" if formats[0] == formats[1] else f"{formats[1]} now"
            yield f"prompt format: it was trained with {formats[0]}, {what}"


def first_adapter(config: Config) -> FirstAdapter | None:
    """Find the adapter that the run trains on from, and check that it is one of this run's base and settings.

    Returns:
        None if the run trains a new adapter.

    Raises:
        ModelError: there is no such adapter, it is damaged, or it belongs to another base.
        ConfigError: the run's method or settings are not those of the adapter.
    """
    if config.model.adapter is None:
        return None
    source = config.model.adapter
    what = f"model.adapter={source}"
    try:
        folder, run_id = logged_models.locate(source, config.tracking.uri)
    except ModelError as error:
        raise ModelError(f"model.adapter: {error}") from error
    saved = read_json(folder / "adapter_config.json")
    if (folder / "trainer_state.json").is_file():
        raise ModelError(f"{what} is a checkpoint: training.resume_from_checkpoint={source} goes on with its training")
    if not saved and any(folder.glob("*.safetensors")):
        raise ModelError(f"{what} is a complete model, not an adapter: use model.model_name_or_path={folder}")
    recorded = saved_config(what, folder)
    _check_base(what, config, recorded, folder)
    if config.model.new_tokens != recorded.model.new_tokens:
        words = json.dumps(recorded.model.new_tokens, ensure_ascii=False)
        raise ConfigError(f"{what} was trained with other new tokens: use 'model.new_tokens={words}'")
    _check_settings(what, config, _as_saved(recorded, saved))
    ranks = _ranks(folder, saved) if recorded.lora_start == "eva" else {}
    return FirstAdapter(folder, run_id, recorded, ranks)


def base_origin(config: Config) -> str | None:
    """Say from which run the base model comes; None if it was not made by a run."""
    if (folder := check_place(config.model.model_name_or_path)) is None or not (folder / CONFIG_FILE).is_file():
        return None
    if made := exported(folder):
        return made
    run_id = None
    with suppress(ModelError):  # the journal of that run is damaged, which its model is not
        _, run_id = logged_models.locate(str(folder), config.tracking.uri)
    return f"trained as a whole by {f'run {run_id}' if run_id else 'an unknown run'}"


def _check_base(what: str, config: Config, recorded: Config, folder: Path) -> None:
    """Check that the run's base is the one that the adapter was trained on.

    Raises:
        ModelError: it is another one.
    """
    ours, theirs = config.model, recorded.model
    names = ours.model_name_or_path, theirs.model_name_or_path
    now = run_key.model_version(ours.model_name_or_path, ours.revision)
    then = read_json(folder / run_key.BASE_FILE).get("version")
    same = then == now if then else names[0] == names[1]  # older versions of this program did not save it
    if names[1].startswith(PREFIXES):  # several built-in models have the same version
        same = same and names[0] == names[1] and ours.random_config == theirs.random_config
    if same:
        return
    words = f"model.model_name_or_path={names[1]}"
    if re.fullmatch("[0-9a-f]{40}", str(then)):  # a commit on the hub
        words += f" model.revision={then}"
    raise ModelError(
        f"{what}: {names[0]} (version {now}) is not the base that it was trained on (version {then}): use {words}"
    )


def _ranks(folder: Path, saved: dict[str, Any]) -> dict[str, Any]:
    """Return the ranks that EVA chose for each layer, as PEFT's settings.

    Raises:
        ModelError: they are not numbers by the names of layers.
    """
    ranks = {name: saved.get(name) or {} for name in _CHOSEN_FROM_ROWS}
    for name, values in ranks.items():
        pairs = values.items() if isinstance(values, dict) else [("", None)]
        if not all(re.fullmatch(r"[\w.]+", key) and type(value) in (int, float) for key, value in pairs):
            raise ModelError(f"{folder / 'adapter_config.json'} is damaged: {name} must have a number for each layer")
    return ranks


def _as_saved(recorded: Config, saved: dict[str, Any]) -> Config:
    """Return the config of the run that saved an adapter, with the settings of what it saved."""
    if not moves_base_weights(recorded.lora_start):
        return recorded
    changed = {name: saved[name] for name in _CHANGED_AT_SAVING if saved.get(name)}
    method = recorded.method.model_copy(update=changed)
    variant = recorded.lora_variant.model_copy(update={"name": "lora", "init_lora_weights": True})
    return recorded.model_copy(update={"method": method, "lora_variant": variant})


def _check_settings(what: str, config: Config, theirs: Config) -> None:
    """Check that the run's adapter is built as the saved one; dropout may differ.

    Raises:
        ConfigError: it is not; the message has the words with which it would be.
    """
    if config.method.peft_type != theirs.method.peft_type:
        raise ConfigError(
            f"{what} is an adapter of method={theirs.method.name}, and this run has method={config.method.name}: use "
            f"method={theirs.method.name}"
        )
    bare = skeleton(config.model)
    with compatibility.ignored():
        now, then = (_settings(run, bare) for run in (config, theirs.model_copy(update={"model": config.model})))
    names = sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name))
    if different := [name for name in names if not name.endswith("dropout")]:
        listed_words = " ".join(_words(config, theirs, different))
        listed = "; ".join(f"{name} is {then.get(name)} there and {now.get(name)} here" for name in different)
        raise ConfigError(f"{what} has other settings than this run: {listed}; to train on from it: {listed_words}")


def _words(config: Config, theirs: Config, different: list[str]) -> Iterator[str]:
    """Yield the words of a command line that give `config` the settings of `theirs`."""
    ours_of_variant, of_variant = config.lora_variant.settings, theirs.lora_variant.settings
    name = theirs.lora_variant.name
    if name != config.lora_variant.name:
        yield f"lora_variant={name}"
    for key in different:
        if key in ours_of_variant or key in of_variant:
            if name in ("lora", config.lora_variant.name) and key in of_variant and key != "init_lora_weights":
                yield f"lora_variant.{key}={_word(of_variant[key])}"
        else:
            yield f"method.{key}={_word(theirs.peft_settings.get(key))}"


def _settings(config: Config, bare: Any) -> dict[str, Any]:
    """Return PEFT's settings in a form that can be compared."""
    settings: Any = adapters.peft_config(config, bare)
    values = {name: sorted(value) if isinstance(value, set) else value for name, value in settings.to_dict().items()}
    if "init_lora_weights" in values:
        values["init_lora_weights"] = config.peft_settings.get("init_lora_weights", True)
    if values.get("target_modules") == "all-linear":
        values["target_modules"] = shortest_names(linear_layers(bare), bare)
    elif isinstance(values.get("target_modules"), list):
        values["target_modules"] = sorted(values["target_modules"])
    return values


def _word(value: Any) -> str:
    """Return a value as it is written on the command line."""
    if value is None:
        return "null"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(str, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)
