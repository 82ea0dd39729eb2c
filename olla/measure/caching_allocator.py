"""What PyTorch's CUDA caching allocator would reserve: a model of it, without a GPU and without torch.

The allocator takes *segments* from the driver, cuts them into *blocks*, and keeps what is released for
later requests. So it reserves more than it hands out, and the difference is lost to fragmentation.

The rules are those of ``DeviceCachingAllocator`` in ``c10/cuda/CUDACachingAllocator.cpp``, with the
constants of ``c10/core/AllocatorConfig.h``, as of PyTorch 2.14. Revisions back to late 2024 have the same
rules; in the older ones, today's setting ``large_segment_size`` is the constant ``kLargeBuffer``, and both
are 20 MiB. Docstrings name the function that they model. Every setting but ``expandable_segments`` has its
default: no ``max_split_size``, so that every block may be cut and the rules for oversized ones never
apply; no ``roundup_power2_divisions``; no garbage collection.

Not modelled: several streams, private pools (CUDA graphs), what others take from the device, and the
rests of segments that hold parameters, if these are not among the events: a step could use them, too.
Segments get ascending addresses, which decide between free blocks of equal size; a driver may choose others.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from olla.errors import OutOfMemoryError
from olla.graph.events import Allocate, Event

__all__ = ["Block", "CachingAllocator", "Replay", "replay"]

MIN_BLOCK_SIZE = 512  # kMinBlockSize: every size is a multiple of it
SMALL_SIZE = 2**20  # kSmallSize: the largest request of the small pool
SMALL_BUFFER = 2 * 2**20  # kSmallBuffer: a segment, or a page, of the small pool
LARGE_BUFFER = 20 * 2**20  # large_segment_size: a segment for requests below MIN_LARGE_ALLOC, or a page
MIN_LARGE_ALLOC = 10 * 2**20  # kMinLargeAlloc: requests from here on have segments of their own size
ROUND_LARGE = 2 * 2**20  # kRoundLarge: that size is a multiple of it
NO_LIMIT = 2**50  # bytes; more than any device has


@dataclass(slots=True, eq=False)
class Block:
    """A piece of a segment: handed out, cached, or (not ``mapped``) mere address space. Bytes."""

    pool: _Pool
    address: int
    size: int
    mapped: bool = True
    allocated: bool = False
    before: Block | None = None  # its neighbours in the segment
    after: Block | None = None

    @property
    def end(self) -> int:
        """The first address behind it."""
        return self.address + self.size

    @property
    def reach(self) -> int:
        """Its size, with the address space behind it into which it can grow."""
        return self.size + (self.after.size if self.after and not self.after.mapped else 0)

    def cut(self, size: int) -> Block:
        """Keep the first ``size`` bytes; the rest becomes a block of its own, which is returned."""
        rest = Block(self.pool, self.address + size, self.size - size, self.mapped, before=self, after=self.after)
        if self.after:
            self.after.before = rest
        self.after, self.size = rest, size
        return rest

    def merge(self) -> None:
        """Take in the free neighbours that are mapped if this is, unmapped if this is (``try_merge_blocks``)."""
        if (left := self.before) and not left.allocated and left.mapped == self.mapped:
            left.shelf.remove(left)
            self.address, self.size, self.before = left.address, left.size + self.size, left.before
            if self.before:
                self.before.after = self
        if (right := self.after) and not right.allocated and right.mapped == self.mapped:
            right.shelf.remove(right)
            self.size, self.after = self.size + right.size, right.after
            if self.after:
                self.after.before = self

    @property
    def shelf(self) -> _Shelf:
        """Where its pool keeps it while it is free."""
        return self.pool.cached if self.mapped else self.pool.unmapped


class _Shelf:
    """Free blocks in ascending order of ``key``."""

    def __init__(self, key: Callable[[Block], tuple[int, int]]) -> None:
        self.key = key
        self.blocks: list[Block] = []

    def add(self, block: Block) -> None:
        insort(self.blocks, block, key=self.key)

    def remove(self, block: Block) -> None:
        del self.blocks[bisect_left(self.blocks, self.key(block), key=self.key)]


class _Pool:
    """The free blocks for small or for large requests (``BlockPool``)."""

    def __init__(self, page: int, smallest_rest: int) -> None:
        self.page = page  # the unit in which an expandable segment grows
        self.smallest_rest = smallest_rest  # what is less is not split off (``should_split``)
        self.cached = _Shelf(lambda block: (block.size, block.address))
        self.unmapped = _Shelf(lambda block: (block.address, block.size))

    def best_fit(self, size: int) -> Block | None:
        """The smallest cached block of at least ``size``, taken off its shelf (``get_free_block``).

        A block that can grow counts as large as it can become, so that another, fixed one goes first.
        """
        blocks = self.cached.blocks
        at = bisect_left(blocks, (size, 0), key=self.cached.key)
        if at == len(blocks):
            return None
        while at + 1 < len(blocks) and blocks[at + 1].reach < blocks[at].reach:
            at += 1
        return blocks.pop(at)


class CachingAllocator:
    """The caching allocator of one device and one stream.

    Parameters
    ----------
    expandable_segments
        As in ``PYTORCH_ALLOC_CONF=expandable_segments:True``: one segment per pool, which grows page by page.
    capacity_bytes
        What the driver can give; without it, there is no limit.
    """

    def __init__(self, *, expandable_segments: bool = False, capacity_bytes: int | None = None) -> None:
        self.expandable_segments = expandable_segments
        self.capacity_bytes = NO_LIMIT if capacity_bytes is None else capacity_bytes
        self.allocated_bytes = self.peak_allocated_bytes = 0  # handed out, in rounded sizes
        self.reserved_bytes = self.peak_reserved_bytes = 0  # taken from the driver
        self._small = _Pool(SMALL_BUFFER, MIN_BLOCK_SIZE)
        self._large = _Pool(LARGE_BUFFER, MIN_BLOCK_SIZE if expandable_segments else SMALL_SIZE + 1)
        self._next_address = 0

    def allocate(self, size: int) -> Block:
        """Hand out a block of at least ``size`` bytes, ``size`` positive (``malloc``, ``alloc_found_block``).

        Raises
        ------
        OutOfMemoryError
            If the driver cannot give what is missing, even after it has got back what is cached.
        """
        if size < 1:
            raise ValueError(f"an allocation has at least one byte, not {size}")
        size = _round_up(size, MIN_BLOCK_SIZE)
        pool = self._small if size <= SMALL_SIZE else self._large
        block = pool.best_fit(size) or self._reserve(pool, size)
        if not block:
            self.empty_cache()
            block = self._reserve(pool, size)
        if not block:
            raise OutOfMemoryError(
                f"{size:,} bytes do not fit: of {self.capacity_bytes:,} bytes, {self.reserved_bytes:,} are reserved, "
                f"and {self.allocated_bytes:,} of these are allocated"
            )
        if block.size - size >= pool.smallest_rest:
            pool.cached.add(block.cut(size))
        block.allocated = True
        self.allocated_bytes += block.size
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)
        return block

    def release(self, block: Block) -> None:
        """Take back what :meth:`allocate` handed out, merged with its free neighbours (``free_block``)."""
        if not block.allocated:
            raise ValueError("a block is released that is not allocated")
        self.allocated_bytes -= block.size
        block.allocated = False
        block.merge()
        block.shelf.add(block)

    def empty_cache(self) -> None:
        """Give the driver back all segments, or pages of expandable ones, that are free (``release_cached_blocks``)."""
        for pool in (self._large, self._small):
            for block in tuple(pool.cached.blocks):
                if self.expandable_segments:
                    self._unmap(block)
                elif not block.before and not block.after:
                    pool.cached.remove(block)
                    self._count_reserved(-block.size)

    def _reserve(self, pool: _Pool, size: int) -> Block | None:
        """A block of at least ``size`` new bytes, or None if the driver has no more (``alloc_block``)."""
        if self.expandable_segments:
            return self._expand(pool, size)
        segment = _segment_size(size)
        if self.reserved_bytes + segment > self.capacity_bytes:
            return None
        self._count_reserved(segment)
        return self._addresses(pool, segment, mapped=True)

    def _expand(self, pool: _Pool, size: int) -> Block | None:
        """Map memory behind, before or between cached blocks (``try_allocate_expandable_block``)."""
        block: Block | None = self._room(pool, size)
        if block and not block.mapped:
            block = self._map(block, min(size, block.size))
        while block and block.size < size:
            hole = block.after
            assert hole, "there is room behind the block"
            block = self._map(hole, min(size - block.size, hole.size))
        if block:
            pool.cached.remove(block)
        return block

    def _room(self, pool: _Pool, size: int) -> Block:
        """Where free blocks and holes begin that have ``size`` bytes together (``find_expandable_block``)."""
        for hole in pool.unmapped.blocks:
            first = hole.before if hole.before and not hole.before.allocated else hole
            block: Block | None = first
            room = 0
            while block and not block.allocated and room < size:
                room += block.size
                block = block.after
            if room >= size:
                return first
        # A segment has addresses for an eighth more than all memory, because pages may move to its end.
        segment = self._addresses(pool, _round_up(self.capacity_bytes * 9 // 8, pool.page), mapped=False)
        pool.unmapped.add(segment)
        return segment

    def _map(self, hole: Block, size: int) -> Block | None:
        """Back the first pages of a hole with memory, or None if the driver has no more (``map_block``)."""
        size = _round_up(size, hole.pool.page)
        if self.reserved_bytes + size > self.capacity_bytes:
            return None
        hole.shelf.remove(hole)
        if size < hole.size:
            hole.pool.unmapped.add(hole.cut(size))
        hole.mapped = True
        hole.merge()
        hole.shelf.add(hole)
        self._count_reserved(size)
        return hole

    def _unmap(self, block: Block) -> None:
        """Give back the whole pages of a cached block; what is before and behind stays cached (``unmap_block``)."""
        page = block.pool.page
        start, end = _round_up(block.address, page), block.end // page * page
        if start >= end:
            return
        cached = block.shelf
        cached.remove(block)
        if start > block.address:
            rest = block.cut(start - block.address)
            cached.add(block)
            block = rest
        if end < block.end:
            cached.add(block.cut(end - start))
        self._count_reserved(-block.size)
        block.mapped = False
        block.merge()
        if block.before or block.after:
            block.shelf.add(block)

    def _addresses(self, pool: _Pool, size: int, *, mapped: bool) -> Block:
        address = _round_up(self._next_address, pool.page)
        self._next_address = address + size
        return Block(pool, address, size, mapped)

    def _count_reserved(self, change: int) -> None:
        self.reserved_bytes += change
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)


def _round_up(size: int, unit: int) -> int:
    """The first multiple of ``unit`` from ``size`` on; for blocks, ``round_size``."""
    return -(-size // unit) * unit


def _segment_size(size: int) -> int:
    """Bytes of the segment that is reserved for a request of ``size`` (``get_allocation_size``)."""
    if size <= SMALL_SIZE:
        return SMALL_BUFFER
    return LARGE_BUFFER if size < MIN_LARGE_ALLOC else _round_up(size, ROUND_LARGE)


@dataclass(frozen=True, slots=True)
class Replay:
    """What the caching allocator makes of a sequence of events. Bytes."""

    peak_allocated_bytes: int  # at most handed out at once, in rounded sizes
    peak_reserved_bytes: int  # at most taken from the driver
    reserved_bytes: int  # what it holds at the end

    @property
    def fragmentation(self) -> float:
        """The share of the reserved peak that is above the allocated peak."""
        return 1 - self.peak_allocated_bytes / self.peak_reserved_bytes if self.peak_reserved_bytes else 0.0


def replay(
    events: Sequence[Event], *, steps: int = 2, expandable_segments: bool = False, capacity_bytes: int | None = None
) -> Replay:
    """Run ``events`` through a fresh :class:`CachingAllocator`, ``steps`` times over.

    What a step leaves allocated, its outputs, is released before the next. The second step finds what the
    first has left in the cache, as every later one will.

    Raises
    ------
    OutOfMemoryError
        If ``capacity_bytes`` are not enough.
    ValueError
        If a name is allocated that is allocated already, or an allocation has no bytes.
    """
    allocator = CachingAllocator(expandable_segments=expandable_segments, capacity_bytes=capacity_bytes)
    live: dict[int, Block] = {}
    for _ in range(steps):
        for block in live.values():
            allocator.release(block)
        live.clear()
        for event in events:
            if isinstance(event, Allocate):
                if event.name in live:
                    raise ValueError(f"{event} comes before the release of the same name")
                live[event.name] = allocator.allocate(event.size)
            else:
                allocator.release(live.pop(event.name))
    return Replay(allocator.peak_allocated_bytes, allocator.peak_reserved_bytes, allocator.reserved_bytes)
