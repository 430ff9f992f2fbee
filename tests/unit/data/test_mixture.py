"""How many rows of each source an epoch has, and in which order."""

from collections import Counter
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_exp.config.sections.mixture import REPLAY, MixtureConfig
from qlora_exp.data import mixture
from qlora_exp.utils.errors import DataError

SIZES = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 3000), min_size=1)


def mixed(sizes: dict[str, int], weights: dict[str, float] | None = None, **more) -> MixtureConfig:
    sources = {name: {"path": f"{name}.jsonl"} for name in sizes}
    for name, weight in (weights or {}).items():
        sources[name]["weight"] = weight
    return MixtureConfig(sources=sources, **more)


@st.composite
def shared(draw) -> tuple[dict[str, int], dict[str, float]]:
    sizes = draw(SIZES)
    parts = {name: draw(st.integers(1, 100)) for name in sizes}
    return sizes, {name: part / sum(parts.values()) for name, part in parts.items()}


@given(sizes=SIZES)
def test_without_shares_each_row_is_trained_on_once(sizes: dict[str, int]):
    assert mixture.counts(sizes, mixed(sizes)) == sizes
    assert mixture.counts(sizes, mixed(sizes, mixing_temperature=1)) == sizes
    for stopping in ("first_exhausted", "all_exhausted"):
        proportional = {name: float(Fraction(size, sum(sizes.values()))) for name, size in sizes.items()}
        assert mixture.counts(sizes, mixed(sizes, proportional, stopping=stopping)) == sizes


@given(case=shared(), stopping=st.sampled_from(["first_exhausted", "all_exhausted"]))
def test_an_epoch_has_the_shares_of_the_weights_and_ends_as_it_says(case, stopping: str):
    sizes, weights = case
    length = min(size / weights[name] for name, size in sizes.items())
    if stopping == "first_exhausted" and min(weights.values()) * length < 0.6:
        return  # a source would have no row
    counts = mixture.counts(sizes, mixed(sizes, weights, stopping=stopping))
    total = sum(counts.values())
    for name, count in counts.items():
        assert abs(count - weights[name] * total) <= 1 + len(sizes) * weights[name]  # each is rounded apart
    seen_whole = [name for name in sizes if counts[name] >= sizes[name]]
    assert seen_whole == [*sizes] if stopping == "all_exhausted" else seen_whole
    assert any(counts[name] == sizes[name] for name in sizes)
    if stopping == "first_exhausted":
        assert all(counts[name] <= sizes[name] for name in sizes)


@given(sizes=SIZES, temperature=st.floats(1, 1e6))
def test_a_temperature_lies_between_proportional_and_equal(sizes: dict[str, int], temperature: float):
    counts = mixture.counts(sizes, mixed(sizes, mixing_temperature=temperature, stopping="all_exhausted"))
    order = sorted(sizes, key=sizes.__getitem__)
    for less, more in pairwise(order):
        assert counts[less] <= counts[more] + 1
        assert counts[less] * sizes[more] >= (counts[more] - 1) * sizes[less]  # a smaller source is seen more often


def test_a_high_temperature_gives_equal_shares():
    sizes = {"a": 10, "b": 1000}
    assert mixture.counts(sizes, mixed(sizes, mixing_temperature=1e9)) == {"a": 10, "b": 10}


@given(sizes=SIZES, share=st.floats(0.05, 0.9), available=st.integers(1, 500))
def test_replayed_rows_have_their_share(sizes: dict[str, int], share: float, available: int):
    if share / (1 - share) * sum(sizes.values()) < 0.6:
        return  # there would be no row to replay
    counts = mixture.counts({**sizes, REPLAY: available}, mixed(sizes, replay=share))
    assert {name: count for name, count in counts.items() if name != REPLAY} == sizes
    assert counts[REPLAY] == pytest.approx(share * sum(counts.values()), abs=1)


@given(rows=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 200)), min_size=1, max_size=6))
def test_no_row_is_lost_before_its_source_is_exhausted(rows: list[tuple[int, int]]):
    sizes, trained = [size for size, _ in rows], [count for _, count in rows]
    order = mixture.epoch(sizes, trained)
    assert len(order) == sum(trained)
    begin = 0
    for size, count in rows:
        own = [number - begin for number in order.tolist() if begin <= number < begin + size]
        assert own == [number % size for number in range(count)]  # in its order, and again from its beginning
        times = Counter(own)
        assert max(times.values()) - min(times[number] for number in range(size)) <= 1
        begin += size


@given(trained=st.lists(st.integers(0, 100), max_size=6))
def test_each_source_is_spread_evenly(trained: list[int]):
    order = mixture.evenly(trained)
    assert sorted(order.tolist()) == list(range(sum(trained)))
    sources = np.repeat(np.arange(len(trained)), trained)[order]
    for source, count in enumerate(trained):
        seen = np.cumsum(sources == source)
        expected = (np.arange(len(order)) + 1) * count / max(1, len(order))
        assert np.abs(seen - expected).max(initial=0) <= len(trained)


def test_a_single_source_keeps_its_order():
    assert mixture.epoch([5], [5]).tolist() == [0, 1, 2, 3, 4]


def test_too_small_a_share_and_too_long_an_epoch_are_refused():
    sizes = {"few": 3, "many": 1000}
    with pytest.raises(DataError, match="an epoch of 3 rows would have no row of many"):
        mixture.counts(sizes, mixed(sizes, {"few": 0.99, "many": 0.01}))
    sizes = {"few": 3, "many": 10_000_000}
    with pytest.raises(DataError, match="an epoch would have 1,000,000,000 rows, those of few 330,000,000 times"):
        mixture.counts(sizes, mixed(sizes, {"few": 0.99, "many": 0.01}, stopping="all_exhausted"))


def test_line_says_rows_shares_and_passes():
    portions = {"a": mixture.Portion(60, 90, 5), "b": mixture.Portion(1000, 10, 3)}
    assert mixture.line(portions, {"a": 500, "b": 1500}) == (
        "an epoch has 100 rows: a 90 (90.0% of rows, 25.0% of learned tokens; 1.5 passes over 60 rows), "
        "b 10 (10.0% of rows, 75.0% of learned tokens; 0.01 passes over 1,000 rows)"
    )
