"""The families of rows of the integer program, one small function each."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from olla.ilp.program import Program
from olla.order.problem import Integers
from olla.solve import Model

__all__ = [
    "ORDER",
    "arena",
    "certainly_apart",
    "certainly_together",
    "one_above_the_other",
    "resident_set",
    "together",
]

Booleans = npt.NDArray[np.bool_]


def created_once(program: Program) -> None:
    """Every op runs at one step, and creates all its storages there."""
    ops, steps = np.nonzero(program.run >= 0)
    program.model.constrain("created_once", ops, program.run[ops, steps], 1, "==", np.ones(len(program.run)))


def one_op_per_step(program: Program) -> None:
    """At every step, one op runs."""
    ops, steps = np.nonzero(program.run >= 0)
    program.model.constrain("one_op_per_step", steps, program.run[ops, steps], 1, "==", np.ones(len(program.run)))


def continuity(program: Program) -> None:
    """What is kept was kept or created at the step before."""
    storages, steps = np.nonzero(program.keep >= 0)
    rows = np.arange(len(storages))
    before, created = program.keep[storages, steps - 1], program.run[program.creator[storages], steps - 1]
    columns = np.concatenate([program.keep[storages, steps], before, created])
    signs = np.repeat([1, -1, -1], len(rows))
    there = columns >= 0
    program.model.constrain(
        "continuity", np.tile(rows, 3)[there], columns[there], signs[there], "<=", np.zeros(len(rows))
    )


def one_state(program: Program) -> None:
    """A storage is not created where it is kept."""
    created = program.run[program.creator]
    both = (created >= 0) & (program.keep >= 0)
    rows = np.arange(int(both.sum()))
    columns = np.concatenate([created[both], program.keep[both]])
    program.model.constrain("one_state", np.tile(rows, 2), columns, 1, "<=", np.ones(len(rows)))


def inputs_present(program: Program) -> None:
    """An op runs only where every storage is kept that it touches and does not create."""
    ops, storages = _uses(program)
    running, step = np.nonzero(program.run[ops] >= 0)
    runs, kept = program.run[ops[running], step], program.keep[storages[running], step]
    rows = np.arange(len(runs))
    columns, signs = np.concatenate([runs, kept]), np.repeat([1, -1], len(rows))
    there = columns >= 0
    program.model.constrain(
        "inputs_present", np.tile(rows, 2)[there], columns[there], signs[there], "<=", np.zeros(len(rows))
    )


def precedence(program: Program) -> None:
    """An op that must run before another has run before, where no input says so already."""
    ops, storages = _uses(program)
    said = set(zip(program.creator[storages].tolist(), ops.tolist(), strict=True))
    pairs = zip(program.problem.predecessors.items.tolist(), program.problem.predecessors.owners.tolist(), strict=True)
    rows, columns, signs, count = [], [], [], 0
    for earlier, later in pairs:
        if (earlier, later) in said:
            continue
        for step in range(int(program.first[later]), int(program.last[earlier]) + 1):
            until, before = program.run[later, : step + 1], program.run[earlier, :step]
            for found, sign in ((until[until >= 0], 1), (before[before >= 0], -1)):
                rows.append(np.full(len(found), count))
                columns.append(found)
                signs.append(np.full(len(found), sign))
            count += 1
    if count:
        triplets = np.concatenate(rows), np.concatenate(columns), np.concatenate(signs)
        program.model.constrain("precedence", *triplets, "<=", np.zeros(count))


def resident_set(program: Program, limit: int, counted: Integers) -> None:
    """At no step is more in memory than ``limit``, of the storages that are counted, and of workspaces."""
    problem, unit = program.problem, program.unit
    sizes = np.zeros(len(problem.sizes), np.int64)
    sizes[counted] = problem.sizes[counted] // unit
    own = problem.workspace // unit
    np.add.at(own, program.creator, sizes)
    ops, at = np.nonzero(program.run >= 0)
    storages, kept_at = np.nonzero(program.keep >= 0)
    steps = np.arange(problem.op_count)
    program.model.constrain(
        "resident_set",
        np.concatenate([at, kept_at, steps]),
        np.concatenate([program.run[ops, at], program.keep[storages, kept_at], np.full(len(steps), limit)]),
        np.concatenate([own[ops], sizes[storages], np.full(len(steps), -1)]),
        "<=",
        np.zeros(len(steps)),
    )


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
    program: Program, one: Integers, other: Integers, below: Integers, above: Integers, always: Booleans
) -> None:
    """Storages are one above the other if they are alive at the same step; some always are."""
    chosen = np.concatenate([below[always], above[always]])
    count = int(always.sum())
    program.model.constrain("together", np.tile(np.arange(count), 2), chosen, 1, "==", np.ones(count))
    created = program.run[program.creator]
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


def certainly_apart(program: Program, one: Integers, other: Integers) -> Booleans:
    """Whether all that touches one storage must run before the other is created, or the reverse."""
    return _dead_before(program, one, other) | _dead_before(program, other, one)


def certainly_together(program: Program, one: Integers, other: Integers) -> Booleans:
    """Whether some op touches both storages."""
    touchers = program.problem.touchers
    sets = [set(touchers.row(storage).tolist()) for storage in range(len(program.problem.sizes))]
    return np.array([bool(sets[a] & sets[b]) for a, b in zip(one, other, strict=True)], bool)


def _dead_before(program: Program, one: Integers, other: Integers) -> Booleans:
    touchers, before = program.problem.touchers, program.before
    return np.array(
        [
            all(op != program.creator[b] and before[program.creator[b], op] for op in touchers.row(a))
            for a, b in zip(one, other, strict=True)
        ],
        bool,
    )


def _possible(alive: Integers, storages: Integers) -> Booleans:
    created, kept = alive[:, storages] >= 0
    possible: Booleans = created | kept
    return possible


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


def _uses(program: Program) -> tuple[Integers, Integers]:
    """Pairs of an op and a storage that it touches and has not created."""
    touches = program.problem.touches
    ops, storages = touches.owners, touches.items
    used = program.creator[storages] != ops
    return ops[used], storages[used]


# What makes an order one.
ORDER = (created_once, one_op_per_step, continuity, one_state, inputs_present, precedence)
