import pytest
from helpers.past_runs import recorded
from hypothesis import given
from hypothesis import strategies as st

from qlora_exp.results.compare import compare
from qlora_exp.results.page import looks

LABELS = st.text(alphabet="ab/.=# \x1b…é数", max_size=70)


def test_no_two_of_64_rows_look_alike():
    drawn = [looks.look(index) for index in range(64)]
    assert len({(look.colour, look.marker) for look in drawn}) == 64
    assert len({(look.colour, look.symbol) for look in drawn}) == 64
    assert len({(look.colour, look.dashes) for look in drawn}) == 64
    assert len({looks.look(index) for index in range(512)}) == 512
    # In grey, the first eight rows still differ.
    assert len({look.symbol for look in drawn[:8]}) == 8


@given(st.lists(LABELS, min_size=1, max_size=30), st.integers(12, 60))
def test_shortened_names_stay_different(texts: list[str], most: int):
    names = looks.distinct(texts, most)
    assert len(set(names)) == len(texts)
    assert all(len(name) <= most for name in names)
    if len(set(texts)) == len(texts) and max(map(len, texts)) <= most:
        assert names == texts


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (60, ["name=lora r=8 lora_alpha=16", "name=qlora r=8 lora_alpha=32"]),
        (24, ["lora r=8 alpha=16", "qlora r=8 alpha=32"]),
        (12, ["lora 8 16", "qlora 8 32"]),
    ],
)
def test_long_names_lose_keys_first(most: int, expected: list[str]):
    runs = [
        recorded([1.0, 2.0], method__name=name, method__r=8 + 0 * alpha, method__lora_alpha=alpha, tags={
            "sweep.method.name": name, "sweep.method.r": str(8 + alpha), "sweep.method.lora_alpha": str(alpha)})
        for name, alpha in (("lora", 16), ("qlora", 32))
    ]  # fmt: skip
    rows = compare(runs).rows
    for row in rows:
        row.label["method.r"] = "8"
    assert looks.names(rows, most) == expected


def test_names_that_differ_only_in_a_secret_are_numbered(monkeypatch):
    rows = compare([recorded([1.0], dataset__path=f"hf_{letter * 30}") for letter in "ab"]).rows
    names = looks.names(rows, 40)
    assert len(set(names)) == 2
    assert not any("aaa" in name or "bbb" in name for name in names)


def test_axes_have_unit_and_direction():
    runs = [recorded([1.0, 2.0], method__r=r, metrics={"after/rougeL": 0.1}) for r in (4, 8)]
    assert looks.metric_label(compare(runs)) == "held-out loss, nats per token (lower is better)"
    assert looks.metric_label(compare(runs, "rougeL")) == "ROUGE-L (higher is better)"
