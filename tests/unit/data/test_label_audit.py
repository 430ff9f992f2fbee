import pytest
from datasets import Dataset
from helpers.rows import tokenized

from qlora_exp.data import label_audit, tokenization
from qlora_exp.utils.errors import DataError


@pytest.mark.parametrize("style", ["alpaca", "chat"])
def test_audit_marks_supervised_text(style: str, tiny_tokenizer):
    tokens = tokenized(
        [{"prompt": "why?", "input": "", "completion": "because"}], tiny_tokenizer, f"dataset.format={style}"
    )
    audit = label_audit.audit(tokens, 512, tiny_tokenizer)
    assert "[[because<|im_end|>" in audit.sample
    assert "why?" in audit.sample.split("[[")[0]
    assert (audit.rows, audit.eos_learned_share, audit.truncated_rows_share) == (1, 1.0, 0.0)
    assert audit.supervised_share == audit.supervised_tokens / audit.tokens


def test_audit_counts_truncated_rows(tiny_tokenizer):
    rows = [{"prompt": "p", "input": "", "completion": "c" * n} for n in (5, 500)] + [
        {"prompt": "p" * 600, "input": "", "completion": "c"}
    ]
    audit = label_audit.audit(tokenized(rows, tiny_tokenizer), 300, tiny_tokenizer)
    assert audit.truncated_rows_share == pytest.approx(2 / 3)
    assert audit.dropped_rows_share == pytest.approx(1 / 3)
    assert audit.eos_learned_share == pytest.approx(1 / 3)


def test_rows_without_supervised_tokens_are_rejected(tiny_tokenizer):
    tokens = tokenized([{"prompt": "p" * 100, "input": "", "completion": "c"}], tiny_tokenizer)
    with pytest.raises(DataError, match="no token of the 1 training rows carries loss"):
        label_audit.audit(tokens, 50, tiny_tokenizer)
    with pytest.raises(DataError, match="no held-out row"):
        tokenization.cut(Dataset.from_list([{"prompt": "p"}]), tokens, 50)
