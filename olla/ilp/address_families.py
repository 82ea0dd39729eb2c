"""The families of rows that say where things are in memory, one small function each."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from olla.ilp.orders import OrderProgram
from olla.order.problem import Integers
from olla.solve import Model

__all__ = ["arena", "certainly_apart", "certainly_together", "one_above_the_other", "together"]

Booleans = npt.NDArray[np.bool_]


def one_above_the_other(
    model: Model,
    offsets: Integers,
    steps: Integers,
    sizes: Integers,
    one: Integers,
    other: Integers,
    below: Integers,
    above: Integers,
    top: int,
) -> None:
    """``one`` ends where the ``other`` begins, or below, if ``below`` is 1; and the reverse if ``above`` is 1."""
    rows = np.arange(len(one))
    for low, high, chosen in ((one, other, below), (other, one, above)):
        # offset + size <= offset of the other; not chosen, `top` makes it hold anyway
        model.constrain(
            "address",
            np.tile(rows, 3),
            np.concatenate([offsets[low], offsets[high], chosen]),
            np.concatenate([steps[low], -steps[high], np.full(len(rows), top)]),
            "<=",
            top - sizes[low],
        )


def together(
    program: OrderProgram, one: Integers, other: Integers, below: Integers, above: Integers, always: Booleans
) -> None:
    """Storages are one above the other if they are alive at the same step; some always are."""
    chosen = np.concatenate([below[always], above[always]])
    count = int(always.sum())
    program.model.constrain("together", np.tile(np.arange(count), 2), chosen, 1, "==", np.ones(count))
    created = program.run[program.maker]
    alive = np.stack([created, program.keep])  # a storage is alive where one of these two is 1
    pairs, steps = np.nonzero(_possible(alive, one[~always]) & _possible(alive, other[~always]))
    rows = np.arange(len(pairs))
    columns = np.concatenate(
        [*alive[:, one[~always][pairs], steps], *alive[:, other[~always][pairs], steps], below[~always][pairs],
         above[~always][pairs]]
    )  # fmt: skip
    signs = np.repeat([1, 1, 1, 1, -1, -1], len(rows))
    there = columns >= 0
    program.model.constrain("together", np.tile(rows, 6)[there], columns[there], signs[there], "<=", np.ones(len(rows)))


def arena(model: Model, offsets: Integers, steps: Integers, sizes: Integers, arena_size: int) -> None:
    """No buffer ends above the arena."""
    rows = np.arange(len(offsets))
    model.constrain(
        "arena",
        np.tile(rows, 2),
        np.concatenate([offsets, np.full(len(rows), arena_size)]),
        np.concatenate([steps, np.full(len(rows), -1)]),
        "<=",
        -sizes,
    )


def certainly_apart(program: OrderProgram, one: Integers, other: Integers) -> Booleans:
    """Whether all that touches one storage must run before the other is created, or the reverse."""
    return _dead_before(program, one, other) | _dead_before(program, other, one)


def certainly_together(program: OrderProgram, one: Integers, other: Integers) -> Booleans:
    """Whether some op touches both storages."""
    touchers = program.problem.touchers
    sets = [set(touchers.row(storage).tolist()) for storage in range(len(program.sizes))]
    return np.array([bool(sets[a] & sets[b]) for a, b in zip(one, other, strict=True)], bool)


def _dead_before(program: OrderProgram, one: Integers, other: Integers) -> Booleans:
    touchers, before = program.problem.touchers, program.before
    return np.array(
        [
            all(op != program.maker[b] and before[program.maker[b], op] for op in touchers.row(a))
            for a, b in zip(one, other, strict=True)
        ],
        bool,
    )


def _possible(alive: Integers, storages: Integers) -> Booleans:
    created, kept = alive[:, storages] >= 0
    possible: Booleans = created | kept
    return possible
