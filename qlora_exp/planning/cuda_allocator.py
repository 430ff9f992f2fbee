"""Simulate torch's CUDA caching allocator, to compute reserved memory and fragmentation without a GPU.

Source: c10/cuda/CUDACachingAllocator.cpp of torch 2.13, without expandable segments. Works on byte counts, not tensors.
"""

from bisect import bisect_left, insort
from collections import defaultdict

from qlora_exp.utils.units import MIB

_ROUND = 512
_SMALL = MIB
"""Blocks up to this size come from the small pool. No large block is split so that this much or less remains."""
_SMALL_SEGMENT = 2 * MIB
_LARGE_SEGMENT = 20 * MIB
_OWN_SEGMENT = 10 * MIB
"""A block of at least this size that fits no free block gets a segment of its own size."""


class Block:
    """A part of a segment, linked to its left and right neighbours."""

    __slots__ = ("free", "left", "offset", "right", "segment", "size", "small", "stream")

    def __init__(self, size: int, segment: int, offset: int, small: bool, stream: int) -> None:
        self.size, self.segment, self.offset, self.small, self.stream = size, segment, offset, small, stream
        self.left: Block | None = None
        self.right: Block | None = None
        self.free = True


class CachingAllocator:
    """Allocator that reuses freed blocks: best fit first, split if too large, joined with free neighbours."""

    def __init__(self) -> None:
        self.allocated = self.reserved = 0
        self.peak_allocated = self.peak_reserved = 0
        self._pools: defaultdict[tuple[int, bool], list[tuple[int, int, int, Block]]] = defaultdict(list)
        """Free blocks by stream and whether they are small."""
        self._segments = 0

    def malloc(self, nbytes: int, stream: int = 0) -> Block:
        """Allocate a block for `nbytes`: from the stream's smallest free block that is large enough, else a segment."""
        size = max(_ROUND, -(-nbytes // _ROUND) * _ROUND)
        small = size <= _SMALL
        pool = self._pools[stream, small]
        place = bisect_left(pool, (size, -1, -1), key=_order)
        if place < len(pool):
            block = pool.pop(place)[3]
        else:
            self._segments += 1
            block = Block(_segment_size(size, small), self._segments, 0, small, stream)
            self.reserved += block.size
            self.peak_reserved = max(self.peak_reserved, self.reserved)
        rest = block.size - size
        if rest >= _ROUND if small else rest > _SMALL:
            remainder = Block(rest, block.segment, block.offset + size, small, stream)
            remainder.left, remainder.right = block, block.right
            if block.right:
                block.right.left = remainder
            block.right, block.size = remainder, size
            self._put(remainder)
        block.free = False
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def free(self, block: Block) -> None:
        """Return a block to its pool, joined with free neighbours."""
        self.allocated -= block.size
        block.free = True
        if (right := block.right) and right.free:
            self._take(right)
            block.size += right.size
            block.right = right.right
            if block.right:
                block.right.left = block
        if (left := block.left) and left.free:
            self._take(left)
            left.size += block.size
            left.right = block.right
            if left.right:
                left.right.left = left
            block = left
        self._put(block)

    def empty_cache(self) -> None:
        """Release segments in which nothing is allocated, and reset the peaks."""
        for key, pool in self._pools.items():
            unused = [entry for entry in pool if entry[3].left is None and entry[3].right is None]
            self.reserved -= sum(entry[0] for entry in unused)
            self._pools[key] = [entry for entry in pool if entry[3].left or entry[3].right]
        self.peak_allocated, self.peak_reserved = self.allocated, self.reserved

    def _put(self, block: Block) -> None:
        insort(self._pools[block.stream, block.small], (block.size, block.segment, block.offset, block), key=_order)

    def _take(self, block: Block) -> None:
        pool = self._pools[block.stream, block.small]
        pool.pop(bisect_left(pool, (block.size, block.segment, block.offset), key=_order))


def _order(entry: tuple[int, ...] | tuple[int, int, int, Block]) -> tuple[int, int, int]:
    return entry[0], entry[1], entry[2]


def _segment_size(size: int, small: bool) -> int:
    if small:
        return _SMALL_SEGMENT
    return _LARGE_SEGMENT if size < _OWN_SEGMENT else -(-size // (2 * MIB)) * 2 * MIB
