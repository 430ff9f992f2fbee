import datetime
import json
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_exp.data.values import Number, as_text

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (" as it is\n", " as it is\n"),
        (True, "true"),
        (3, "3"),
        (Number("1.10"), "1.10"),
        (Number("1e5"), "1e5"),
        (Decimal("1.10"), "1.10"),
        ({"price": Number("2.50"), "ok": False, "é": [None, "x"]}, '{"price": 2.50, "ok": false, "é": [null, "x"]}'),
    ],
)
def test_values_are_written_as_text_or_json(value, text: str):
    assert as_text(value) == text


@given(JSON.filter(lambda value: not isinstance(value, str | None)))
def test_written_json_is_read_as_the_same_value(value):
    assert json.loads(as_text(value)) == value


@pytest.mark.parametrize("value", [float("nan"), datetime.date(2024, 7, 16), b"x", [datetime.datetime(2024, 7, 16)]])
def test_value_that_json_cannot_express_is_rejected(value):
    with pytest.raises(ValueError, match="has no form in JSON"):
        as_text(value)
