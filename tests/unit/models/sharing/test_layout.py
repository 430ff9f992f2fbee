import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_exp.models.sharing import layout
from qlora_exp.training.batches import without_padding

LENGTHS = st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=4)
"""Lengths of the rows of each job's batch."""


def batch(lengths: list[int]) -> dict[str, torch.Tensor]:
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.arange(1, mask.numel() + 1).view_as(mask) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}


@given(LENGTHS)
def test_sequences_of_several_jobs_keep_their_tokens_and_the_ends_of_their_rows(lengths: list[list[int]]):
    batches = [without_padding(batch(each)) for each in lengths]
    ids, positions = ([each[name] for each in batches] for name in ("input_ids", "position_ids"))
    made = layout.in_one_sequence_each(ids, positions, layout.MARKS)
    longest = max(map(sum, lengths))
    assert made["input_ids"].shape == (len(lengths), longest)
    expected = [each + ([longest - sum(each)] if sum(each) < longest else []) for each in lengths]  # and the padding
    flat = [length for each in expected for length in each]
    assert made["cu_seq_lens_q"].diff().tolist() == flat
    assert made["max_length_q"] == max(flat)
    for job, each in enumerate(batches):
        own = slice(0, sum(lengths[job]))
        assert torch.equal(made["input_ids"][job, own], each["input_ids"][0])
        assert torch.equal(made["position_ids"][job, own], each["position_ids"][0])
        assert torch.equal(made["seq_idx"][job, own], each["seq_idx"][0])
        assert (made["seq_idx"][job, sum(lengths[job]) :] > each["seq_idx"].max()).all()


def test_only_the_marks_that_a_batch_has_are_made():
    ids, positions = torch.tensor([[5, 6, 7]]), torch.tensor([[0, 1, 0]])
    assert layout.in_one_sequence_each([ids], [positions], ("position_ids",)).keys() == {"input_ids", "position_ids"}


@given(LENGTHS)
def test_padded_rows_keep_their_tokens(lengths: list[list[int]]):
    batches = [batch(each) for each in lengths]
    made = layout.padded_rows([each["input_ids"] for each in batches], [each["attention_mask"] for each in batches])
    assert made["attention_mask"].sum(dim=1).tolist() == [length for each in lengths for length in each]
    tokens = torch.cat([each["input_ids"][each["attention_mask"] > 0] for each in batches])
    assert torch.equal(made["input_ids"][made["attention_mask"] > 0], tokens)


def test_what_asks_for_more_than_rows_is_named():
    ids = torch.ones(1, 2)
    assert layout.more_than_rows({"input_ids": ids, "position_ids": ids, "use_cache": False, "return_dict": True}) == []
    assert layout.more_than_rows({"position_ids": ids, "attention_mask": ids}) == ["position_ids"]
    assert layout.more_than_rows({"input_ids": ids, "past_key_values": object()}) == ["past_key_values"]
