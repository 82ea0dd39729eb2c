"""Buffers as flat arrays, and time as sections: the form that the compiled planners work on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
from numba import njit

from olla.place.buffers import Buffer

__all__ = ["Integers", "Problem", "Tries"]

Integers = npt.NDArray[np.int64]
Tries = Iterator[tuple[str, Integers] | None]  # how, and the offsets; None now and then, to look at the clock


@dataclass(frozen=True, slots=True)
class Problem:
    """Buffers of some bytes; one entry of each array per buffer.

    Time is cut into sections, the maximal sets of buffers that are alive at once: a section ends
    where a buffer ends after one has begun. Buffers overlap in time if and only if they share a section.
    """

    first: Integers  # a buffer is alive in the sections first .. last
    last: Integers
    lifetimes: Integers  # in time, not in sections
    sizes: Integers
    alignment: Integers
    fixed: Integers  # the only offset allowed; -1: any

    @classmethod
    def of(cls, buffers: Sequence[Buffer]) -> Problem:
        """The problem of placing ``buffers``; those of no bytes can be anywhere, and should be left out."""
        lower, upper = (np.array([getattr(b, name) for b in buffers], np.int64) for name in ("lower", "upper"))
        begins = np.unique(lower)
        # A begin opens a section if something has ended since the begin before it.
        opens = np.zeros(len(begins), bool)
        ends = np.unique(upper)
        opens[1:] = np.searchsorted(ends, begins[1:], "right") > np.searchsorted(ends, begins[:-1], "right")
        section = np.cumsum(opens)
        return cls(
            first=section[np.searchsorted(begins, lower)],
            last=section[np.searchsorted(begins, upper, "left") - 1],
            lifetimes=upper - lower,
            sizes=np.array([b.size for b in buffers], np.int64),
            alignment=np.array([b.alignment for b in buffers], np.int64),
            fixed=np.array([-1 if b.offset is None else b.offset for b in buffers], np.int64),
        )

    @property
    def load(self) -> Integers:
        """Bytes alive in each section: no placement is below the largest of them."""
        change = np.zeros(int(self.last.max(initial=-1)) + 2, np.int64)
        np.add.at(change, self.first, self.sizes)
        np.subtract.at(change, self.last + 1, self.sizes)
        return np.cumsum(change)[:-1]

    @property
    def bound(self) -> int:
        """No placement needs less: the largest load, and the top of the highest fixed buffer."""
        fixed_top = np.where(self.fixed >= 0, self.fixed + self.sizes, 0)
        return int(max(self.load.max(initial=0), fixed_top.max(initial=0)))

    @property
    def unit(self) -> int:
        """What all offsets and tops can be multiples of, if each buffer is as low as can be."""
        unit = np.gcd.reduce(np.concatenate([self.sizes, self.fixed[self.fixed > 0]]))
        while (others := self.alignment[(unit % self.alignment > 0) & (self.alignment % unit > 0)]).size:
            unit = np.gcd.reduce(others, initial=unit)
        return int(unit)

    def largest(self, values: Integers) -> Integers:
        """For each buffer, the largest of the values of its sections."""
        maxima = [values]  # over runs of 1, 2, 4, ... sections; two of them cover any run
        while 2 ** len(maxima) <= len(values):
            half = 2 ** (len(maxima) - 1)
            maxima.append(np.maximum(maxima[-1][:-half], maxima[-1][half:]))
        level = np.log2(self.last - self.first + 1).astype(np.int64)
        result = np.zeros(len(level), np.int64)
        for index, table in enumerate(maxima):
            of = level == index
            result[of] = np.maximum(table[self.first[of]], table[self.last[of] - 2**index + 1])
        return result

    def ordered(self, order: Integers) -> Problem:
        """The same buffers in another order."""
        return Problem(*(getattr(self, field.name)[order] for field in fields(self)))

    def overlaps(self) -> tuple[Integers, Integers]:
        """For each buffer, the others alive at once: those of ``b`` are ``others[start[b]:start[b + 1]]``."""
        return _overlaps(self.first, self.last)


@njit(cache=True, nogil=True)
def _overlaps(first: Integers, last: Integers) -> tuple[Integers, Integers]:
    count = len(first)
    start = np.zeros(count + 1, np.int64)
    for b in range(count):
        start[b + 1] = start[b] + ((first <= last[b]) & (first[b] <= last)).sum() - 1
    others = np.empty(start[count], np.int64)
    k = 0
    for b in range(count):
        for other in range(count):
            if first[other] <= last[b] and first[b] <= last[other] and other != b:
                others[k] = other
                k += 1
    return start, others
