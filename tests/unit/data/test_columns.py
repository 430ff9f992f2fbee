"""Batches and processes change nothing about the result."""

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from qlora_exp.data import columns
from qlora_exp.data.tokenization import IGNORED, for_training

TOKENS = st.lists(
    st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=8), min_size=1, max_size=20
)


def tokens_of(rows: list[list[tuple[int, bool]]]) -> Dataset:
    ids = [[number for number, _ in row] for row in rows]
    labels = [[number if learned else IGNORED for number, learned in row] for row in rows]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


@pytest.mark.parametrize("count", [1, 2, 3])
def test_mapped_keeps_the_order_in_any_number_of_processes(count: int, monkeypatch):
    monkeypatch.setattr(columns, "processes", lambda rows: count)
    monkeypatch.setattr(columns, "BATCH", 7)
    rows = Dataset.from_dict({"number": [*range(100)]}).select([*reversed(range(100))])
    found = columns.mapped(lambda batch: [row["number"] for row in batch], rows, "")
    assert [number for batch in found for number in batch] == [*reversed(range(100))]


def test_few_rows_start_no_process():
    assert columns.processes(3999) == 1


@given(TOKENS, st.data())
@settings(max_examples=30)
def test_columns_equal_those_of_python(rows: list[list[tuple[int, bool]]], data: st.DataObject):
    tokens = tokens_of(rows)
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1))
    picked = tokens.select(chosen)
    assert columns.lengths(picked).tolist() == [len(rows[index]) for index in chosen]
    ((ids,),) = columns.lists(picked, "input_ids")
    pairs = [(number, place) for index in chosen for place, (number, _) in enumerate(rows[index])]
    assert [*zip(ids.values.tolist(), ids.places().tolist(), strict=True)] == pairs
    assert np.bincount(ids.rows(), minlength=len(chosen)).tolist() == ids.lengths.tolist()


@given(TOKENS, st.integers(1, 8))
@settings(max_examples=30)
def test_rows_for_training_are_truncated_and_have_labels(rows: list[list[tuple[int, bool]]], most: int):
    expected = [
        {"input_ids": ids[:most], "labels": labels[:most]}
        for ids, labels in ((row["input_ids"], row["labels"]) for row in tokens_of(rows))
        if any(label != IGNORED for label in labels[:most])
    ]
    prepared = for_training(tokens_of(rows), most)
    assert [*prepared] == expected
    assert [prepared[index] for index in range(len(prepared))] == expected
    assert [*for_training(tokens_of(rows), None)] == [*tokens_of(rows)]


def test_loader_with_workers_gives_each_row_once_in_the_same_order():
    rows = for_training(tokens_of([[(number, True)] * (number % 5 + 1) for number in range(40)]), 3)

    def read(workers: int) -> list:
        order = [*reversed(range(40))]
        loader = DataLoader(rows, batch_size=3, sampler=order, num_workers=workers, collate_fn=lambda batch: batch)
        return [row for batch in loader for row in batch]

    assert read(0) == read(2) == [rows[index] for index in reversed(range(40))]
