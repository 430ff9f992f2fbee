from hypothesis import given
from hypothesis import strategies as st
from mlflow.utils.validation import _validate_metric

from qlora_exp.utils.names import valid_names

NAMES = st.lists(st.text(alphabet="a@(,=/. -:µ\n\0", max_size=6) | st.text(max_size=300), max_size=8)


@given(NAMES)
def test_mlflow_accepts_every_name_and_none_are_confused(names):
    valid = valid_names(names)
    assert valid.keys() == {*names}
    assert len({*valid.values()}) == len(valid)
    for name in valid.values():
        _validate_metric(name, 1.0, 1, 1)
    assert valid_names(valid.values()) == {name: name for name in valid.values()}


def test_names_stay_readable():
    names = ["after/lm_eval/qa (v2)/acc", "after/lm_eval/qa/recall@5", "after/lm_eval/qa/recall-5", "train/loss"]
    first, second, *unchanged = valid_names(names).values()
    assert first == "after/lm_eval/qa -v2-/acc"
    assert second.startswith("after/lm_eval/qa/recall-5-")
    assert unchanged == names[2:]
    assert valid_names(["recall@5"]) == {"recall@5": "recall-5"}
