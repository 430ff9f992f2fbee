import copy

import pytest
from datasets import Dataset
from helpers import tiny_models
from helpers.rows import TEXT, composed, tokenized
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_exp.config.hydra_compose import compose
from qlora_exp.data import columns, prompts, tokenization
from qlora_exp.data.rows import load_heldout, load_rows
from qlora_exp.data.tokenization import IGNORED
from qlora_exp.utils.errors import DataError


@given(prompt=TEXT, completion=TEXT)
@settings(max_examples=25, deadline=None)
def test_only_answer_and_eos_carry_loss(prompt: str, completion: str, tiny_tokenizer):
    row = tokenized([{"prompt": prompt, "input": "", "completion": completion}], tiny_tokenizer)[0]
    learned = [label for label in row["labels"] if label != IGNORED]
    assert tiny_tokenizer.decode(learned[:-1]) == completion
    assert learned[-1] == tiny_tokenizer.eos_token_id
    assert row["labels"][: row["prompt_length"]] == [IGNORED] * row["prompt_length"]
    assert [x for x, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORED] == learned


def test_prompt_carries_loss_on_request(tiny_tokenizer):
    row = tokenized(
        [{"prompt": "p", "input": "", "completion": "c"}], tiny_tokenizer, "training.completion_only_loss=false"
    )[0]
    assert row["labels"] == row["input_ids"]


@pytest.mark.parametrize("format_", ["prompt_completion", "chat"])
@pytest.mark.parametrize("end", ["", "<|im_end|>", " <|im_end|>\n<|im_end|>\n"])
def test_eos_is_learned_once(format_: str, end: str, tiny_tokenizer):
    rows = [{"prompt": "p", "input": "", "completion": f"a6{end}"}]
    row = tokenized(rows, tiny_tokenizer, f"dataset.format={format_}")[0]
    learned = [label for label in row["labels"] if label != IGNORED]
    assert learned.count(tiny_tokenizer.eos_token_id) == 1
    assert tiny_tokenizer.decode(learned).split("<|im_end|>")[0].strip() == row["reference"] == "a6"


def test_eos_in_questions_is_kept_and_at_the_end_of_answers_stands_once(tiny_tokenizer):
    contents = ["q<|im_end|>", "a<|im_end|>\n<|im_end|>", "<|im_end|>r", "b"]
    dialogue = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(contents)]
    row = {"prompt": "", "input": "", "completion": "b", "messages": dialogue}
    (row,) = tokenized([row], tiny_tokenizer, "dataset.format=chat")
    text = tiny_tokenizer.decode(row["input_ids"])
    assert "user\nq<|im_end|><|im_end|>\n" in text
    assert "assistant\na<|im_end|>\n<|im_start|>user\n<|im_end|>r<|im_end|>" in text
    asked = tokenization.prompt_tokens(tiny_tokenizer, "q<|im_end|>", special=True)
    assert asked[-1] == tiny_tokenizer.eos_token_id  # this tokenizer adds none, so that it was in the text


def test_reference_is_the_learned_answer(tiny_tokenizer):
    """Calls and reasoning are part of the answer; special tokens are decoded as those of generated answers are."""
    template = (
        "{% for m in messages %}{{ m.content or '' }}{{ m.tool_calls | tojson if m.tool_calls }}<|im_end|>{% endfor %}"
    )
    tokenizer = copy.copy(tiny_tokenizer)
    tokenizer.chat_template = template
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    dialogue = {"prompt": "", "input": "", "completion": "", "messages": [{"role": "user", "content": "q"}, call]}
    assert tokenized([dialogue], tokenizer, "dataset.format=chat")["reference"][:] == ['[{"name": "f"}]']
    marked = {"prompt": "p", "input": "", "completion": "<|im_start|>0<|im_start|>"}
    assert tokenized([marked], tokenizer)["reference"][:] == ["0"]


def test_row_that_cannot_be_rendered_is_named(make_config, tiny_tokenizer, write_jsonl):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "mood": "good"}]
    path = write_jsonl([{"messages": [turns[0], turns[1] | {"content": f"{number}"}]} for number in range(3)])
    words = [
        f"dataset.path={path}",
        "dataset.format=chat",
        "dataset.messages_column=messages",
        "dataset.drop_leaks=none",
    ]
    config = make_config(*words)
    with pytest.raises(DataError, match=r"rows.jsonl, line \d: .* does not render the key 'mood'"):
        tokenization.tokenize(load_rows(config.dataset).train, config, tiny_tokenizer)


def test_cut_keeps_text_and_tokens_aligned(tiny_tokenizer):
    rows = [
        {"prompt": "p" * 600, "input": "", "completion": "gone"},
        {"prompt": "p", "input": "", "completion": "kept"},
    ]
    text, tokens = tokenization.cut(Dataset.from_list(rows), tokenized(rows, tiny_tokenizer), 300)
    assert text["completion"][:] == ["kept"]
    assert len(tokens) == 1


def test_tokenized_rows_are_cached(make_config, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_EXP_CACHE", str(tmp_path / "cache"))
    rows = load_rows(make_config().dataset).train
    first = tokenization.tokenize(rows, make_config(), tiny_tokenizer)
    monkeypatch.setattr(tokenization, "_tokenize", lambda *_: pytest.fail("tokenized again"))
    again = tokenization.tokenize(rows, make_config("seed=1", "method.r=4", "training.max_length=77"), tiny_tokenizer)
    assert again.to_list() == first.to_list()
    for change in ("dataset.format=prompt_completion", "training.completion_only_loss=false"):
        with pytest.raises(pytest.fail.Exception, match="tokenized again"):
            tokenization.tokenize(rows, make_config(change), tiny_tokenizer)
    with pytest.raises(pytest.fail.Exception, match="tokenized again"):
        tokenization.tokenize(rows.select(range(3)), make_config(), tiny_tokenizer)


def test_unrelated_text_is_deterministic_and_fully_supervised(make_config, tiny_tokenizer):
    checked = make_config("unrelated=python_docs", "training.max_length=100000")
    found = load_heldout(checked.unrelated)
    rows, tokens = tokenization.unrelated(found, checked, tiny_tokenizer)
    assert rows["completion"][:] == load_heldout(checked.unrelated)["completion"][:]
    assert len(rows) == 8
    assert all(len(text) >= 1000 for text in rows["completion"])
    assert all(label != tokenization.IGNORED for labels in tokens["labels"] for label in labels)
    _, shorter = tokenization.unrelated(
        found, make_config("unrelated=python_docs", "training.max_length=50"), tiny_tokenizer
    )
    assert {len(labels) for labels in shorter["labels"]} == {50}


def test_unrelated_text_is_read_from_a_file(make_config, tiny_tokenizer, write_jsonl):
    path = write_jsonl([{"text": f"passage {number}"} for number in range(6)])
    checked = make_config(f"unrelated.path={path}", "unrelated.eval_size=3")
    rows, _ = tokenization.unrelated(load_heldout(checked.unrelated), checked, tiny_tokenizer)
    assert len(rows) == 3


def test_text_that_cannot_be_rendered_names_the_key_of_its_section(make_config, tiny_tokenizer, write_jsonl):
    mute = copy.copy(tiny_tokenizer)
    mute.chat_template = None
    path = write_jsonl([{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}])
    words = [f"unrelated.path={path}", "unrelated.format=chat", "unrelated.messages_column=messages"]
    checked = make_config(*words, f"unrelated.eval_path={path}")
    with pytest.raises(DataError, match=r"line 1: unrelated\.format=chat: .*unrelated\.chat_template=FILE"):
        tokenization.unrelated(load_heldout(checked.unrelated), checked, mute)


def test_assistant_only_loss_covers_every_answer(make_config, tiny_tokenizer, write_jsonl):
    turns = [("user", "hi"), ("assistant", "hello"), ("user", "2+3?"), ("assistant", "5")]
    dialogue = {"chat": [{"role": role, "content": content} for role, content in turns]}
    path = write_jsonl([dialogue, {"chat": [*dialogue["chat"][:1], {"role": "assistant", "content": "no"}]}])
    words = [
        f"dataset.path={path}",
        "dataset.format=chat",
        "dataset.messages_column=chat",
        "dataset.input_column=null",
    ]
    found = []
    for every in ("true", "false"):
        checked = make_config(*words, f"training.assistant_only_loss={every}", "dataset.eval_size=1")
        rows = load_rows(checked.dataset)
        whole = rows.train if len(rows.train[0]["messages"]) == 4 else rows.heldout
        (row,) = tokenization.tokenize(whole, checked, tiny_tokenizer)
        found.append(tiny_tokenizer.decode([label for label in row["labels"] if label != tokenization.IGNORED]))
        assert tiny_tokenizer.decode(row["input_ids"][: row["prompt_length"]]).endswith("<|im_start|>assistant\n")
    assert found == ["hello<|im_end|>\n5<|im_end|>\n", "5<|im_end|>\n"]


def test_answers_that_a_row_excludes_carry_no_loss(make_config, tiny_tokenizer, write_jsonl):
    turns = [("user", "a", 0), ("assistant", "one", 1), ("user", "b", 0), ("assistant", "two", 0), ("user", "c", 0),
             ("assistant", "three", 1)]  # fmt: skip
    rows = [{"chat": [{"role": role, "content": f"{text}{n}", "weight": weight} for role, text, weight in turns]}
            for n in range(2)]  # fmt: skip
    words = [f"dataset.path={write_jsonl(rows)}", "dataset.format=chat", "dataset.messages_column=chat",
             "dataset.input_column=null", "dataset.eval_size=1", "training.assistant_only_loss=true"]  # fmt: skip
    checked = make_config(*words)
    (row,) = tokenization.tokenize(load_rows(checked.dataset).train, checked, tiny_tokenizer)
    learned = tiny_tokenizer.decode([label for label in row["labels"] if label != IGNORED])
    assert [line[:-11] for line in learned.splitlines()] == ["one", "three"]
    assert "two" in tiny_tokenizer.decode(row["input_ids"])
    everything = make_config(*words[:-1], "training.completion_only_loss=false")
    with pytest.raises(DataError, match="line 1: an answer is not to be learned .* set it to true|line 2"):
        tokenization.tokenize(load_rows(everything.dataset).train, everything, tiny_tokenizer)


@pytest.mark.parametrize(
    ("single", "begins"), [(None, []), ("<|im_start|> $A", [601]), ("<|im_start|> $A <|im_end|>", [601]),
                           ("$A <|im_end|>", [])]
)  # fmt: skip
def test_prompt_never_ends_with_the_tokenizers_eos(single, begins):
    tokenizer = tiny_models.tokenizer(single=single, bos_token="<|im_start|>")
    plain = tokenizer("Say river 5.", add_special_tokens=False)["input_ids"]
    assert tokenization.prompt_tokens(tokenizer, "Say river 5.", special=True) == begins + plain
    assert tokenization.prompt_tokens(tokenizer, "Say river 5.", special=False) == plain


def test_each_source_is_tokenized_in_its_own_format(tiny_tokenizer, write_jsonl):
    talk = [{"chat": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a"}]} for n in range(4)]
    paths = write_jsonl(talk, "talk.jsonl"), write_jsonl([{"text": f"story {n}"} for n in range(4)], "story.jsonl")
    keys = ["talk.format=chat", "talk.messages_column=chat", "story.format=text"]
    keys += [f"{name}.path={path}" for name, path in zip(("talk", "story"), paths, strict=True)]
    words = ["dataset=own", "dataset.format=chat", *(f"dataset.sources.{key}" for key in keys)]

    def texts(*more: str) -> dict[str, str]:
        config = compose([*words, *more])
        rows = load_rows(config.dataset).train
        tokens = tokenization.tokenize(rows, config, tiny_tokenizer)
        return {row["source"]: tiny_tokenizer.decode(ids) for row, ids in zip(rows, tokens["input_ids"], strict=True)}

    plain, kind = texts(), texts("dataset.sources.talk.system_message=kind")
    assert plain["talk"].startswith("<|im_start|>user\nq")
    assert plain["story"] == kind["story"]
    assert plain["story"].startswith("story ")
    assert "kind" in kind["talk"]


FORMATS = ["chat", "alpaca", "text"]
TURNS = st.lists(st.sampled_from(["hi", "", "<|im_end|>", "two words", "é"]), min_size=1, max_size=3)


@given(
    drawn=st.lists(st.tuples(TURNS, TEXT), min_size=1, max_size=6), format_=st.sampled_from(["chat", "alpaca", "text"])
)
@settings(max_examples=30, deadline=None)
def test_rows_are_tokenized_together_as_one_by_one(drawn: list, format_: str, tiny_tokenizer):
    encode = tokenization._Encoder(composed(f"dataset.format={format_}"), tiny_tokenizer)
    rows = []
    for asked, answer in drawn:
        said = [piece for text in asked for piece in (("user", text), ("assistant", "so"))]
        turns = [{"role": role, "content": text} for role, text in [*said, ("user", "q"), ("assistant", answer)]]
        rows.append({"prompt": "q", "input": asked[0], "completion": answer, "messages": turns, "place": "line 1"})
    assert encode(rows) == [encode([row])[0] for row in rows]


def test_processes_tokenize_alike(tiny_tokenizer, monkeypatch, tmp_path):
    rows = [{"prompt": f"p{number}", "input": "", "completion": "c" * number} for number in range(40)]
    expected = tokenized(rows, tiny_tokenizer).to_list()
    monkeypatch.setenv("QLORA_EXP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(columns, "processes", lambda count: 2)
    monkeypatch.setattr(columns, "BATCH", 9)
    assert tokenized(rows, tiny_tokenizer).to_list() == expected


@pytest.mark.parametrize("count", [1, 2])
def test_first_bad_row_is_named_in_any_number_of_processes(count: int, tiny_tokenizer, monkeypatch, tmp_path):
    def row(number: int, **more: str) -> dict:
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", **more}]
        return {"prompt": "q", "input": "", "completion": "a", "messages": turns, "place": f"line {number}"}

    monkeypatch.setenv("QLORA_EXP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(columns, "processes", lambda _: count)
    monkeypatch.setattr(columns, "BATCH", 2)
    rows = [row(0), row(1), row(2), row(3, mood="good"), row(4, mood="bad"), row(5), row(6, taste="sweet")]
    with pytest.raises(DataError, match="line 3: .* does not render the key 'mood'"):
        tokenized(rows, tiny_tokenizer, "dataset.format=chat")


def test_forks_start_no_process_for_what_all_rows_need(make_config, tiny_tokenizer, monkeypatch):
    config = make_config("dataset=own", "dataset.path=rows.jsonl", "dataset.format=alpaca")
    rows = [{"prompt": f"{number}+1?", "input": "", "completion": str(number + 1)} for number in range(3)]
    encode = tokenization._Encoder(config, tiny_tokenizer)
    encode.prepare()
    monkeypatch.setattr(prompts._renderer, "call", lambda *_: pytest.fail("rendered again"))
    assert prompts._renderer._pipe is None
    assert len(encode(rows)) == 3
