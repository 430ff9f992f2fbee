"""Each row of an epoch goes to one process, once."""

from types import SimpleNamespace

from accelerate import data_loader, state
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, SequentialSampler

from qlora_exp.libraries.accelerate import even_shares, is_blank, set_shared_states, shared_states


def accelerator(process: int, processes: int, ends: bool = True):
    state = SimpleNamespace(end_of_dataloader=ends)
    return SimpleNamespace(process_index=process, num_processes=processes, gradient_state=state)


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 5))
def test_processes_share_the_rows_of_each_batch(rows: int, size: int, processes: int):
    def shares(process: int) -> list[list[int]]:
        sampler = BatchSampler(SequentialSampler(range(rows)), size, drop_last=False)
        with even_shares():
            shard = data_loader.BatchSamplerShard(sampler, processes, process)
        batches = list(shard)
        assert len(batches) == len(shard)
        if is_blank(accelerator(process, processes), rows, size):
            assert len(batches.pop()) == 1
            batches.append([])
        return batches

    of_all = [shares(process) for process in range(processes)]
    whole = list(BatchSampler(SequentialSampler(range(rows)), size * processes, drop_last=False))
    assert [[row for batch in batches for row in batch] for batches in zip(*of_all, strict=True)] == whole
    assert all(max(map(len, last)) - min(map(len, last)) <= 1 for last in [[batches[-1] for batches in of_all]])


def test_rows_count_before_the_end_of_an_epoch():
    assert is_blank(accelerator(1, 2), 5, 2)
    assert not is_blank(accelerator(1, 2, ends=False), 5, 2)


def test_states_are_put_back():
    before = shared_states()
    state.GradientState._shared_state["name"] = 1
    inside = shared_states()
    set_shared_states(before)
    assert "name" not in state.GradientState._shared_state
    set_shared_states(inside)
    assert state.GradientState._shared_state.pop("name") == 1
