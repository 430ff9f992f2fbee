"""What processes exchange; a single one exchanges with itself."""

import pytest
from helpers import processes
from hypothesis import given
from hypothesis import strategies as st

from qlora_exp.distributed import group
from qlora_exp.environment.ranks import Ranks


@given(st.lists(st.integers()), st.integers(1, 5))
def test_shares_together_are_the_list(items, size):
    with pytest.MonkeyPatch.context() as patched:
        shares = []
        for rank in range(size):
            patched.setattr(group, "ranks", lambda rank=rank: Ranks(rank, rank, size, size))
            shares.append(group.own_share(items))
        patched.setattr(group, "gather", lambda _: shares)
        assert len({*map(len, shares)}) == 1
        assert group.joined_shares(shares[0], len(items)) == items


def test_single_process_exchanges_with_itself():
    assert group.gather("a") == ["a"]
    assert group.from_main("a") == "a"
    assert group.joined_shares(group.own_share([1, 2]), 2) == [1, 2]
    assert group.call_on_main(max, 1, 2) == 2
    with pytest.raises(ZeroDivisionError):
        group.call_on_main(divmod, 1, 0)


def test_tensors_take_the_values_of_the_main_process(tmp_path):
    both = [processes.start(processes.take_from_main, rank, tmp_path) for rank in (0, 1)]
    for process in both:
        process.join()
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)] == ["6.0 5.0", "6.0 5.0"]
