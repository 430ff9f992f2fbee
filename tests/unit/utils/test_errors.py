from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_exp.config.hydra_compose import conf_dir, options
from qlora_exp.config.tables import peft_methods
from qlora_exp.config.validate import known_keys
from qlora_exp.utils.errors import (
    ConfigError,
    did_you_mean,
    first_line,
    is_out_of_memory,
    last_line,
    nearest,
    type_and_first_line,
)

GROUPS = sorted(folder.name for folder in conf_dir().iterdir() if folder.is_dir() and folder.name != "hydra")
NAMES = {group: options(group) for group in GROUPS} | {"keys": known_keys(), "LoRA": [*peft_methods.settings("LORA")]}
words = st.text(st.characters(codec="utf-8") | st.sampled_from("abr._-"), max_size=12)


def transpositions(name: str) -> list[str]:
    """Swap each two neighbours of the last dotted part in turn."""
    begin = name.rfind(".") + 1
    swapped = [f"{name[:at]}{name[at + 1]}{name[at]}{name[at + 2 :]}" for at in range(begin, len(name) - 1)]
    return [word for word in swapped if word != name]


@given(words, st.lists(words))
def test_hints_are_at_most_three_names_without_repetition_or_the_word_itself(word: str, names: list[str]):
    hints = nearest(word, names)
    assert len(hints) <= 3
    assert {*hints} <= {*names} - {word}
    assert max(Counter(hints).values(), default=1) == 1


@pytest.mark.parametrize("group", NAMES)
def test_transposed_name_is_suggested_first(group: str):
    first = {
        word: (name, nearest(word, NAMES[group])[:1])
        for name in NAMES[group]
        if not name.startswith("lora_variant.")  # the same names as those of `method.`
        for word in transpositions(name)
        if word not in NAMES[group]
    }
    assert first
    assert {word: case for word, case in first.items() if case[1] != [case[0]]} == {}


@pytest.mark.parametrize("group", NAMES)
def test_missing_or_extra_letter_is_suggested(group: str):
    for name in NAMES[group]:
        for word in (f"{name}{name[-1]}", name[:-1]):
            if len(name.rpartition(".")[2]) > 3 and word not in NAMES[group]:
                assert name in nearest(word, NAMES[group]), word


@pytest.mark.parametrize(
    ("word", "hints"),
    [
        ("lroa", ["lora"]),
        ("olra", ["lora"]),
        ("lorra", ["lora"]),
        ("lra", ["lora"]),
        ("LoRA", ["lora"]),
        ("q-lora", ["qlora"]),
        ("prompt", ["prompt_tuning", "adaption_prompt"]),
        ("tuning", ["ln_tuning", "p_tuning", "supertuning"]),
        ("zzz", []),
        ("r", []),
        ("", []),
    ],
)
def test_hints_for_a_method(word: str, hints: list[str]):
    found = nearest(word, options("method"))
    assert sorted(found) == sorted(hints)
    assert found[:1] == hints[:1] or word == "tuning"


@pytest.mark.parametrize(
    ("word", "hints"),
    [
        ("training.lr", ["training.learning_rate"]),
        ("training.LR", ["training.learning_rate"]),
        ("method.rank", ["method.r"]),
        ("lora_variant.lora_rank", ["lora_variant.r"]),
        ("model.name", ["model.model_name_or_path"]),
        ("training.r", ["method.r", "lora_variant.r"]),
        ("optimizer.learning_rate", ["training.learning_rate"]),
        ("learning_rate", ["training.learning_rate"]),
        ("training.device", ["device"]),
        ("training.per-device-train-batch-size", ["training.per_device_train_batch_size"]),
        ("training.max-sequence-length", ["training.max_length"]),
        ("training.warmup", ["training.warmup_steps"]),
        ("training.max", ["training.max_steps", "training.max_length", "training.max_grad_norm"]),
        ("method.lora_aplha", ["method.lora_alpha"]),
        ("lora_variant.use_dorra", ["lora_variant.use_dora"]),
        ("traning.learning_rate", ["training.learning_rate"]),
        ("tracking.name", ["tracking.run_name", "tracking.experiment_name"]),
        ("nothing.like_that", []),
    ],
)
def test_hints_for_a_key(word: str, hints: list[str]):
    assert nearest(word, known_keys()) == hints


def test_similar_name_of_another_section_is_no_hint_for_a_short_key():
    assert nearest("training.bas", ["method.bias"]) == ["method.bias"]
    assert nearest("training.bus", ["method.bias"]) == []


def test_only_the_strongest_kind_of_likeness_is_listed():
    assert nearest("cosine_with_restart", ["cosine", "cosine_with_restarts"]) == ["cosine_with_restarts"]
    assert nearest("cosin", ["cosine", "cosine_with_restarts", "constant"]) == ["cosine", "cosine_with_restarts"]


@pytest.mark.parametrize(
    ("names", "ending"),
    [
        ([], "."),
        (["ab1"], "; did you mean 'ab1'?"),
        (["ab1", "ab2"], "; did you mean 'ab1' or 'ab2'?"),
        (["ab1", "ab2", "ab3"], "; did you mean 'ab1', 'ab2' or 'ab3'?"),
        (["ab1", "ab2", "ab3", "ab4"], "; did you mean 'ab1', 'ab2' or 'ab3'?"),
    ],
)
def test_ending_of_the_sentence_reads_well(names: list[str], ending: str):
    assert did_you_mean("abx", names) == ending


@pytest.mark.parametrize("line", [first_line, last_line])
@pytest.mark.parametrize(("text", "said"), [("one", "one"), ("", "ValueError"), (" \n\n", "ValueError")])
def test_line_of_an_error_is_never_empty(line: Callable[[BaseException], str], text: str, said: str):
    assert line(ValueError(text)) == said


def test_lines_of_a_longer_error():
    error = ValueError(f"\n{'a' * 400}\nat the end\n")
    assert first_line(error) == "a" * 300
    assert last_line(error) == "at the end"
    assert type_and_first_line(error, 2) == "ValueError: aa"
    assert type_and_first_line(ValueError()) == "ValueError"


def test_cause_of_a_long_line_is_kept():
    error = OSError(f"API request to https://h failed: {'x' * 300} (Caused by SSLError('CERTIFICATE_VERIFY_FAILED'))")
    line = first_line(error)
    assert line.startswith("API request")
    assert "(Caused by SSLError('CERTIFICATE_VERIFY_FAILED'))" in line
    assert len(line) <= 300
    autoflush = "(raised as a result of Query-invoked autoflush; consider using a session.no_autoflush block)"
    assert first_line(OSError(f"{autoflush}\nvalue too long for type character varying(250)")).startswith("value too")
    assert first_line(ConfigError("y" * 400)) == "y" * 400
    assert len(first_line(ConfigError("y" * 400), 120)) == 120


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("could not create a primitive"), True),  # oneDNN's, on a CPU
        (RuntimeError("could not create a primitive descriptor for a matmul primitive"), False),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), True),
        (MemoryError(), True),
        (ValueError("out of memory"), False),
    ],
)
def test_errors_of_memory_that_ran_out_are_known(error: BaseException, expected: bool):
    assert is_out_of_memory(error) is expected
