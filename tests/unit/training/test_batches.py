"""Rows of a step are the same however they are arranged in its batches: the same losses, the same gradients."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from qlora_exp.data.tokenization import IGNORED
from qlora_exp.models import builtin
from qlora_exp.training import batches

PAD = 0


def step_of(lengths, size, multiple=None):
    """Return the rows of a step and its batches, as TRL's collator pads them; the first half of a row is a prompt."""
    rows = []
    for number, length in enumerate(lengths):
        ids = [3 + (7 * number + place) % 200 for place in range(length)]
        rows.append({"input_ids": ids, "labels": [IGNORED] * (length // 2) + ids[length // 2 :]})
    collate = DataCollatorForLanguageModeling(pad_token_id=PAD, pad_to_multiple_of=multiple)
    return rows, [collate(rows[begin : begin + size]) for begin in range(0, len(rows), size)]


def rows_in(found):
    return [
        tuple(batch[name][row][batch["attention_mask"][row].bool()].tolist() for name in ("input_ids", "labels"))
        for batch in found
        for row in range(len(batch["input_ids"]))
    ]


LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=13)


@given(LENGTHS, st.integers(1, 5), st.sampled_from([None, 8]))
@example([1, 1, 2], 2, None)
@example([1, 2, 2, 1], 3, None)
@example([10, 1, 1, 1], 3, None)
@settings(deadline=None)
def test_sorted_batches_have_the_rows_of_the_step_and_no_more_padding(lengths, size, multiple):
    _, before = step_of(lengths, size, multiple)
    after = batches.arranged(before, "by_length", multiple or 1)
    assert sorted(map(str, rows_in(after))) == sorted(map(str, rows_in(before)))
    assert sorted(len(batch["input_ids"]) for batch in after) == sorted(len(batch["input_ids"]) for batch in before)
    assert sum(batch["input_ids"].numel() for batch in after) <= sum(batch["input_ids"].numel() for batch in before)
    found = [int(count) for batch in after for count in batch["attention_mask"].sum(dim=1)]
    assert len(after) == 1 or found == sorted(lengths, reverse=True)
    for batch in after:
        assert batch["input_ids"].shape[1] % (multiple or 1) == 0
        assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()


@given(LENGTHS)
@settings(deadline=None)
def test_rows_without_padding_are_those_of_trl(lengths):
    rows, (padded,) = step_of(lengths, len(lengths))
    expected = DataCollatorForLanguageModeling(pad_token_id=PAD, padding_free=True)(rows)
    (found,) = batches.arranged([padded], "free")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(torch.as_tensor(found[name]), torch.as_tensor(value)), name
    assert batches.count_rows(found) == batches.count_rows(padded) == len(lengths)


def test_step_with_a_batch_that_only_keeps_a_process_busy_stays():
    _, before = step_of([3, 9, 4], 2)
    before[1]["labels"] = torch.full_like(before[1]["labels"], IGNORED)
    assert all(found is given for found, given in zip(batches.by_length(before), before, strict=True))


@pytest.mark.parametrize("padding", ["by_length", "free"])
def test_losses_and_gradients_are_those_of_padded_batches(padding: str):
    model = AutoModelForCausalLM.from_pretrained(builtin.folder_of("random:llama"))
    _, before = step_of([5, 24, 9, 17, 3, 12], 2)

    def passes(step):
        model.zero_grad()
        count = sum((batch["labels"][:, 1:] != IGNORED).sum() for batch in step)
        losses = [model(**batch, use_cache=False, num_items_in_batch=count).loss for batch in step]
        torch.stack(losses).sum().backward()
        return sum(loss.item() for loss in losses), [parameter.grad.clone() for parameter in model.parameters()]

    (plain, gradients), (loss, found) = passes(before), passes(batches.arranged(before, padding))
    assert loss == pytest.approx(plain, rel=1e-6)
    for expected, gradient in zip(gradients, found, strict=True):
        assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-7)
