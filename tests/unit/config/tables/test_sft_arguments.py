"""Every argument of SFTConfig has a class, and what is not accepted is refused with what to do."""

import json
from collections import Counter

import pytest
from helpers.scripts import script
from hypothesis import given
from hypothesis import strategies as st

from qlora_exp.config.hydra_compose import compose
from qlora_exp.config.tables import declared_types, sft_arguments
from qlora_exp.config.validate import from_dict, known_keys, no_such_key
from qlora_exp.utils.errors import ConfigError

CLASSES = (sft_arguments.ACCEPTED, sft_arguments.OWN_KEYS, sft_arguments.DECIDED, sft_arguments.NO_EFFECT)


def test_the_file_is_what_the_installed_libraries_declare():
    """If this fails, TRL or transformers has changed: run `nox -s library-settings` and read the diff."""
    assert script("library_settings").written_arguments() == sft_arguments.FILE.read_text("utf-8")


def test_every_argument_of_sftconfig_is_in_exactly_one_class():
    """A new one is passed on only after somebody read what it does."""
    counted = Counter(name for names in CLASSES for name in names)
    declared, file = sft_arguments.declared().keys(), "qlora_exp/config/tables/sft_arguments.py"
    tables = f"ACCEPTED, OWN_KEYS (by _OF_TRAINING), DECIDED, NO_EFFECT of {file}"
    assert not (new := sorted(declared - counted.keys())), f"in none of {tables}: {', '.join(new)}"
    assert not (gone := sorted(counted.keys() - declared)), f"SFTConfig has no more, so remove: {', '.join(gone)}"
    several = sorted(name for name, count in counted.items() if count > 1)
    assert not several, f"in more than one of {tables}: {', '.join(several)}"


def test_narrowed_types_accept_what_the_library_does():
    from trl.trainer.sft_config import SFTConfig

    defaults = {name: getattr(SFTConfig, name) for name in sft_arguments.ACCEPTED}
    assert defaults.pop("pad_to_multiple_of") == "auto"  # no multiple, but on a Neuron device
    assert [*sft_arguments.check(defaults)] == []


def test_keys_that_are_named_instead_exist():
    assert {*sft_arguments.OWN_KEYS.values()} - {"hydra.run.dir"} <= {*known_keys()}


def test_every_key_of_training_with_a_name_of_sftconfig_is_named_for_it():
    from qlora_exp.config.sections.training import TrainingConfig

    shared = TrainingConfig.model_fields.keys() & sft_arguments.declared().keys()
    missing = sorted(name for name in shared if sft_arguments.OWN_KEYS.get(name) != f"training.{name}")
    where = "_OF_TRAINING of qlora_exp/config/tables/sft_arguments.py (docs/how_to/add_a_key.md)"
    assert not missing, f"add to {where}: {', '.join(missing)}"


@pytest.mark.parametrize("name", sorted(sft_arguments.declared().keys() - sft_arguments.ACCEPTED.keys()))
def test_what_is_not_accepted_is_refused_with_a_reason_whatever_its_value(name: str):
    for value in (None, "/etc/passwd"):
        (problem,) = sft_arguments.check({name: value})
        assert problem.startswith(f"training.sft_config.{name}: ")
        assert any(words in problem for words in ("set ", "change nothing: ", "not an argument of a run here: "))


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"label_smoothing": 0.1}, "did you mean 'label_smoothing_factor'?"),
        ({"label_smoothing_factor": "0.1"}, "valid number"),
        ({"label_smoothing_factor": 1.0}, "less than 1"),
        ({"eval_delay": -1}, "greater than or equal to 0"),
        ({"eval_delay": float("inf")}, "finite number"),
        ({"dataloader_pin_memory": 1}, "valid boolean"),
        ({"dataloader_prefetch_factor": 10**9}, "less than or equal to 1000"),
        ({"dataloader_multiprocessing_context": "os.system"}, "'fork', 'spawn' or 'forkserver'"),
        ({"torch_compile_backend": "own_package"}, "'inductor', 'eager'"),
        ({"torch_compile_mode": "max"}, "'default', 'reduce-overhead'"),
        ({"pad_to_multiple_of": 0}, "greater than 0"),
        ({"gradient_checkpointing_kwargs": {"every_n_layer": 2}}, ".every_n_layer: a run takes every_n_layers and"),
        ({"gradient_checkpointing_kwargs": {"every_n_layers": 0}}, ".every_n_layers: Input should be greater than 0"),
        ({"gradient_checkpointing_kwargs": {"context_fn": "os.system"}}, ".context_fn: a run takes"),
        ({"gradient_checkpointing_kwargs": "{}"}, "valid dictionary"),
        ({"output_dir": "/tmp"}, "set hydra.run.dir instead"),
        ({"report_to": "wandb"}, "set the keys of tracking"),
        ({"prediction_loss_only": True}, "it would change nothing: evaluation during training only measures the loss"),
        ({"dataset_num_proc": 4}, "the run tokenizes rows itself"),
    ],
)
def test_wrong_argument_is_refused_by_name(arguments: dict, problem: str):
    (found,) = sft_arguments.check(arguments)
    assert problem in found


def test_refusal_of_an_unknown_argument_says_if_other_versions_are_installed(monkeypatch):
    monkeypatch.setattr(declared_types, "version", lambda _: "9.9")
    assert "installed is 9.9: `nox -s library-settings` updates them" in next(sft_arguments.check({"newer": 1}))


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("training.label_smoothing_factor", "did you mean 'training.sft_config.label_smoothing_factor'?"),
        ("training.seed", "set seed instead"),
        ("training.report_to", "set the keys of tracking"),
    ],
)
def test_argument_in_the_place_of_a_key_is_explained(key: str, hint: str):
    assert hint in no_such_key(key)


@pytest.mark.parametrize(
    "words",
    [
        ["training.sft_config.label_smoothing_factor=0.1"],
        ["+training.sft_config.label_smoothing_factor=0.1"],
        ["training.sft_config={label_smoothing_factor: 0.1}"],
        ["training.sft_config={eval_delay: 1}", "training.sft_config={label_smoothing_factor: 0.1,eval_delay: null}"],
    ],
)
def test_every_spelling_of_hydra_sets_an_argument(words: list[str]):
    found = compose(words).training.sft_config
    assert {name: value for name, value in found.items() if value is not None} == {"label_smoothing_factor": 0.1}


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**40) | st.floats() | st.sampled_from(["", "a=1", "momentum=0.5"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["every_n_layers", "x"]), inner),
    max_leaves=3,
)


@given(st.dictionaries(st.sampled_from([*sft_arguments.ACCEPTED, "output_dir", "what"]), VALUES, max_size=3))
def test_any_value_is_accepted_or_refused_by_name(arguments: dict):
    try:
        config = from_dict({"training": {"sft_config": arguments}})
    except ConfigError as error:
        lines = str(error).splitlines()
    else:
        lines = []
        assert json.loads(config.model_dump_json())["training"]["sft_config"] == arguments
    assert all(line.startswith("training.sft_config.") for line in lines)
