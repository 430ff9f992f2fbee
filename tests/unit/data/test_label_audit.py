from itertools import groupby

import pytest
from datasets import Dataset
from helpers import tiny_models
from helpers.rows import tokenized
from helpers.tiny_models import CHATML
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_exp.config.sections.mixture import REPLAY
from qlora_exp.data import label_audit, tokenization
from qlora_exp.data.end_of_turn import EndOfTurn, end_of_turn
from qlora_exp.data.tokenization import IGNORED
from qlora_exp.utils.errors import DataError


@pytest.mark.parametrize("style", ["alpaca", "chat"])
def test_audit_marks_supervised_text(style: str, tiny_tokenizer):
    tokens = tokenized(
        [{"prompt": "why?", "input": "", "completion": "because"}], tiny_tokenizer, f"dataset.format={style}"
    )
    audit = label_audit.audit(tokens, 512, tiny_tokenizer, end_of_turn(tiny_tokenizer, None))
    assert "[[because<|im_end|>" in audit.sample
    assert "why?" in audit.sample.split("[[")[0]
    assert (audit.rows, audit.eos_learned_share, audit.truncated_rows_share) == (1, 1.0, 0.0)
    assert audit.supervised_share == audit.supervised_tokens / audit.tokens


def test_brackets_of_the_text_are_no_marks(tiny_tokenizer):
    tokens = tokenized([{"prompt": "see [[here]]", "input": "", "completion": "a]] b"}], tiny_tokenizer)
    sample = label_audit.audit(tokens, 512, tiny_tokenizer, end_of_turn(tiny_tokenizer, None)).sample
    assert r"see \[\[here\]\]" in sample.split("[[")[0]
    assert sample.split("[[")[1:] == [r"a\]\] b<|im_end|>]]"]


def test_audit_counts_truncated_rows(tiny_tokenizer, caplog):
    rows = [{"prompt": "p", "input": "", "completion": "c" * n} for n in (5, 500)] + [
        {"prompt": "p" * 600, "input": "", "completion": "c"}
    ]
    audit = label_audit.audit(tokenized(rows, tiny_tokenizer), 300, tiny_tokenizer, end_of_turn(tiny_tokenizer, None))
    assert audit.truncated_rows_share == pytest.approx(2 / 3)
    assert audit.dropped_rows_share == pytest.approx(1 / 3)
    assert audit.eos_learned_share == pytest.approx(1 / 3)
    assert "carries loss in only 50% of the rows that are learned (50% are truncated)" in caplog.text


@pytest.mark.parametrize(
    ("after", "end", "share", "warning"),
    [
        ("<|im_end|>\n", "<|im_end|>", 1.0, None),
        ("", None, 0.0, "puts nothing after an answer: answers end only at evaluation.max_new_tokens"),
        ("\n", None, 0.0, "puts only '\\n' after an answer: answers end only at evaluation.max_new_tokens"),
        ("</turn>\n", "</turn>", 1.0, None),
        ("\n\nUser:", "\n\nUser:", 1.0, None),
        ("ause\n", "ause", 1.0, "the answers of 1 of 1 rows contain 'ause'"),
    ],
)
def test_audit_counts_the_end_of_the_chat_template(after: str, end: str | None, share: float, warning, caplog):
    tokenizer = tiny_models.tokenizer(template=CHATML.replace("<|im_end|>\n", after), eos_token="<|endoftext|>")
    tokens = tokenized([{"prompt": "why?", "input": "", "completion": "because"}], tokenizer, "dataset.format=chat")
    assert tokens["reference"] == ["because"]  # without its end
    found = label_audit.audit(tokens, 512, tokenizer, end_of_turn(tokenizer, tokenizer.chat_template))
    assert (found.end_token or found.end_text, found.eos_learned_share) == (end, share)
    assert (warning in caplog.text) if warning else not caplog.records
    if found.end_text and not warning:
        label_audit.audit(
            tokens, len(tokens[0]["input_ids"]) - 3, tokenizer, end_of_turn(tokenizer, tokenizer.chat_template)
        )
        says = "carries loss in only 0% of the rows that are learned (100% are truncated)"
        assert f"{end!r}, which ends an answer, {says}" in caplog.text


def test_rows_without_supervised_tokens_are_rejected(tiny_tokenizer):
    tokens = tokenized([{"prompt": "p" * 100, "input": "", "completion": "c"}], tiny_tokenizer)
    with pytest.raises(DataError, match="no token of the 1 training rows carries loss: .* rows have 242 to 242 tokens"):
        label_audit.audit(tokens, 50, tiny_tokenizer, end_of_turn(tiny_tokenizer, None))
    with pytest.raises(DataError, match="no held-out row"):
        tokenization.cut(Dataset.from_list([{"prompt": "p"}]), tokens, 50)


def test_sources_are_audited_apart_and_together(tiny_tokenizer):
    end, audits = end_of_turn(tiny_tokenizer, None), {}
    for name, rows, style in (
        ("talk", [{"prompt": "p", "input": "", "completion": "c"}] * 3, "prompt_completion"),
        ("story", [{"prompt": "", "input": "", "completion": "s" * 400}], "text"),
    ):
        tokens = tokenized(rows, tiny_tokenizer, f"dataset.format={style}")
        audits[name] = label_audit.audit(tokens, 300, tiny_tokenizer, end, source=name)
    whole = label_audit.together(audits)
    assert (whole.rows, whole.truncated_rows_share, whole.eos_learned_share) == (4, 0.25, 0.75)
    assert whole.supervised_tokens == sum(audit.supervised_tokens for audit in audits.values())
    assert whole.supervised_share == whole.supervised_tokens / whole.tokens
    assert whole.sample.startswith("talk: p[[c")
    assert "story: [[sss" in whole.sample
    nothing = tokenized([{"prompt": "p" * 400, "input": "", "completion": "c"}], tiny_tokenizer)
    with pytest.raises(DataError, match="^talk: no token of the 1 training rows carries loss"):
        label_audit.audit(nothing, 300, tiny_tokenizer, end, source="talk")


def test_replayed_text_need_not_end(tiny_tokenizer, caplog):
    tokens = tokenized([{"prompt": "", "input": "", "completion": "s" * 400}], tiny_tokenizer, "dataset.format=text")
    label_audit.audit(tokens, 300, tiny_tokenizer, end_of_turn(tiny_tokenizer, None), source=REPLAY)
    assert caplog.text == ""


ROW = st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=8)


@given(rows=st.lists(ROW, min_size=1, max_size=20), most=st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_audit_counts_as_row_by_row(rows: list[list[tuple[int, bool]]], most: int, tiny_tokenizer):
    ids = [[number for number, _ in row] for row in rows]
    labels = [[number if learned else IGNORED for number, learned in row] for row in rows]
    learned = [[label for label in row[1:most] if label != IGNORED] for row in labels]
    tokens = Dataset.from_dict({"input_ids": ids, "labels": labels})
    if not any(learned):
        with pytest.raises(DataError, match="carries loss"):
            label_audit.audit(tokens, most, tiny_tokenizer, EndOfTurn(2, ""))
        return
    audit = label_audit.audit(tokens, most, tiny_tokenizer, EndOfTurn(2, ""))
    assert audit.tokens == sum(min(len(row), most) for row in rows)
    assert audit.supervised_tokens == sum(map(len, learned))
    assert audit.truncated_rows_share == sum(len(row) > most for row in rows) / len(rows)
    assert audit.dropped_rows_share == sum(not row for row in learned) / len(rows)
    assert audit.eos_learned_share == sum(2 in row for row in learned) / len(rows)
    first = next(place for place, row in enumerate(learned) if row)
    texts = [
        tiny_tokenizer.decode([number for number, _ in run])
        for _, run in groupby(rows[first][:most], key=lambda pair: pair[1])
    ]
    assert audit.sample.replace("[[", "").replace("]]", "") == "".join(texts)
