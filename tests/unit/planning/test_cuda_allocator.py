"""The simulated allocator keeps its books right, whatever is asked of it, and does what torch's is known to do."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_exp.planning.cuda_allocator import CachingAllocator
from qlora_exp.utils.units import MIB


@given(st.lists(st.tuples(st.integers(1, 40 * MIB), st.integers(0, 30)), max_size=80))
def test_allocated_and_free_blocks_sum_to_reserved(steps: list[tuple[int, int]]):
    allocator, held = CachingAllocator(), []
    for size, place in steps:
        if place < len(held):
            allocator.free(held.pop(place))
        else:
            held.append(allocator.malloc(size))
            assert held[-1].size >= size
        assert allocator.allocated == sum(block.size for block in held) <= allocator.reserved
        free = sum(entry[0] for pool in allocator._pools.values() for entry in pool)
        assert allocator.allocated + free == allocator.reserved
    for block in held:
        allocator.free(block)
    allocator.empty_cache()
    assert allocator.reserved == allocator.allocated == 0


@pytest.mark.parametrize(
    ("sizes", "reserved"),
    [
        ([1], 2 * MIB),
        ([MIB, MIB], 2 * MIB),
        ([MIB + 1], 20 * MIB),
        ([9 * MIB, 9 * MIB], 20 * MIB),
        ([10 * MIB + 1], 12 * MIB),
        ([100 * MIB, 1], 102 * MIB),
    ],
)
def test_segments_have_the_sizes_of_torchs_allocator(sizes: list[int], reserved: int):
    allocator = CachingAllocator()
    for size in sizes:
        allocator.malloc(size)
    assert allocator.reserved == reserved


def test_freed_block_is_reused_and_split():
    allocator = CachingAllocator()
    allocator.free(allocator.malloc(100 * MIB))
    allocator.malloc(60 * MIB)
    allocator.malloc(40 * MIB)
    assert allocator.reserved == 100 * MIB


def test_remainder_too_small_for_a_request_is_not_used():
    allocator = CachingAllocator()
    allocator.free(allocator.malloc(100 * MIB))
    allocator.malloc(60 * MIB)
    allocator.malloc(41 * MIB)
    assert allocator.reserved == 142 * MIB
    assert allocator.allocated == 102 * MIB  # the second block is its whole segment


def test_emptying_the_cache_keeps_segments_in_use():
    allocator = CachingAllocator()
    kept, gone = allocator.malloc(60 * MIB), allocator.malloc(40 * MIB)
    allocator.free(gone)
    allocator.empty_cache()
    assert allocator.reserved == 60 * MIB == kept.size


def test_block_is_reused_on_its_stream_only():
    allocator = CachingAllocator()
    allocator.free(allocator.malloc(30 * MIB, 1))
    allocator.malloc(30 * MIB)
    assert allocator.reserved == 60 * MIB
    allocator.malloc(30 * MIB, 1)
    assert allocator.reserved == 60 * MIB
