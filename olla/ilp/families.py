"""The families of rows that say when ops run and what is in memory, one small function each."""

from __future__ import annotations

import numpy as np

from olla.ilp.orders import OrderProgram
from olla.ilp.program import Program
from olla.ilp.sequences import SequenceProgram
from olla.order.problem import Integers

__all__ = ["ORDER", "SEQUENCE", "resident_set"]

# ---------------------------------------------------------------------------------- of all programs


def continuity(program: Program) -> None:
    """What is kept was kept, made or fetched at the step before."""
    contents, steps = np.nonzero(program.keep >= 0)
    before = program.keep[contents, steps - 1]
    made = program.run[program.maker[contents], steps - 1]
    fetched = program.fetch[contents, steps - 1]
    _at_most(program, "continuity", [program.keep[contents, steps]], [before, made, fetched])


def one_state(program: Program) -> None:
    """A storage has one content at a time, and none that is older where it is created."""
    creator = program.creator
    rows, columns = [], []
    for of, variables in (
        (np.arange(len(creator)), program.run[creator]),
        (program.storage, program.keep),
        (program.storage, program.fetch),
    ):
        found, steps = np.nonzero(variables >= 0)
        rows.append(of[found] * len(program.steps) + steps)
        columns.append(variables[found, steps])
    used, row = np.unique(np.concatenate(rows), return_inverse=True)
    program.model.constrain("one_state", row, np.concatenate(columns), 1, "<=", np.ones(len(used)))


def inputs_present(program: Program) -> None:
    """An op runs only where all contents that it uses are in memory."""
    ops, contents = program.uses.owners, program.uses.items
    running, step = np.nonzero(program.run[ops] >= 0)
    kept, fetched = program.keep[contents[running], step], program.fetch[contents[running], step]
    _at_most(program, "inputs_present", [program.run[ops[running], step]], [kept, fetched])


def resident_set(program: Program, limit: int, counted: Integers) -> None:
    """At no step is more in memory than the variable ``limit``, of the storages that are counted, and of workspaces."""
    sizes = np.zeros(len(program.sizes), np.int64)
    sizes[counted] = program.sizes[counted] // program.unit
    own = program.workspace // program.unit
    np.add.at(own, program.creator, sizes)
    variables = [program.run, program.keep, program.fetch]
    weights = [own, sizes[program.storage], sizes[program.storage]]
    found = [np.nonzero(of >= 0) for of in variables]
    steps = program.steps
    program.model.constrain(
        "resident_set",
        np.concatenate([*(at for _, at in found), steps]),
        np.concatenate([*(of[at] for of, at in zip(variables, found, strict=True)), np.full(len(steps), limit)]),
        np.concatenate([*(of[rows] for of, (rows, _) in zip(weights, found, strict=True)), np.full(len(steps), -1)]),
        "<=",
        np.zeros(len(steps)),
    )


# ---------------------------------------------------------------------------------- of orders


def created_once(program: OrderProgram) -> None:
    """Every op runs at one step."""
    ops, steps = np.nonzero(program.run >= 0)
    program.model.constrain("created_once", ops, program.run[ops, steps], 1, "==", np.ones(len(program.run)))


def one_op_per_step(program: OrderProgram) -> None:
    """At every step, one op runs."""
    ops, steps = np.nonzero(program.run >= 0)
    program.model.constrain("one_op_per_step", steps, program.run[ops, steps], 1, "==", np.ones(len(program.run)))


def precedence(program: OrderProgram) -> None:
    """An op that must run before another has run before, where no input says so already."""
    said = set(zip(program.maker[program.uses.items].tolist(), program.uses.owners.tolist(), strict=True))
    pairs = program.problem.predecessors
    for earlier, later in zip(pairs.items.tolist(), pairs.owners.tolist(), strict=True):
        if (earlier, later) not in said:
            for step in range(int(program.first[later]), int(program.last[earlier]) + 1):
                _never_more(program, "precedence", program.run[later, : step + 1], program.run[earlier, :step], 0)


# ---------------------------------------------------------------------------------- of sequences, in which ops repeat


def created(program: SequenceProgram) -> None:
    """Every op runs, and those that may not be repeated run once."""
    for op, once in enumerate(program.once):
        in_time = program.run[op, : program.last[op] + 1]  # for all that must run after it
        program.model.constrain("created", 0, in_time[in_time >= 0], 1, "==" if once else ">=", [1])


def idle_first(program: SequenceProgram) -> None:
    """At most one op runs at each step, and none only before all others."""
    steps = program.steps
    ops, at = np.nonzero(program.run >= 0)
    columns = program.run[ops, at]
    program.model.constrain("one_op_per_step", at, columns, 1, "<=", np.ones(len(steps)))
    later = at > 0
    program.model.constrain(
        "idle_first",
        np.concatenate([at[at < steps[-1]], at[later] - 1]),
        np.concatenate([columns[at < steps[-1]], columns[later]]),
        np.concatenate([np.ones((at < steps[-1]).sum()), -np.ones(later.sum())]),
        "<=",
        np.zeros(len(steps) - 1),
    )


def overwritten(program: SequenceProgram) -> None:
    """What an op writes in place is gone at the next step."""
    for content, op in program.overwrites:
        runs, kept = program.run[op, :-1], program.keep[content, 1:]
        both = (runs >= 0) & (kept >= 0)
        rows = np.arange(int(both.sum()))
        columns = np.concatenate([runs[both], kept[both]])
        program.model.constrain("overwritten", np.tile(rows, 2), columns, 1, "<=", np.ones(len(rows)))


def writes_in_turn(program: SequenceProgram) -> None:
    """Ops that use persistent state run before all runs of what changes it later, and after what changed it before."""
    for earlier, later in program.turns:
        for step in program.steps:
            if program.once[later]:
                begun = np.append(program.run[later, : step + 1], program.run[earlier, step])
                _never_more(program, "writes_in_turn", begun, program.run[earlier, :0], 1)
            else:
                _never_more(program, "writes_in_turn", program.run[later, [step]], program.run[earlier, :step], 0)


def fetchable(program: SequenceProgram) -> None:
    """Only what was made can be fetched, and what no other op has made anew since."""
    for content, step in zip(*np.nonzero(program.fetch >= 0), strict=True):
        fetched, made = program.fetch[content, [step]], program.run[program.maker[content]]
        _never_more(program, "fetchable", fetched, made[:step], 0)
        others = program.maker[
            (program.storage == program.storage[content]) & (program.maker != program.maker[content])
        ]
        for other in others:
            for since in range(step):
                if program.run[other, since] >= 0:
                    spoilt = np.append(fetched, program.run[other, since])
                    _never_more(program, "fetchable", spoilt, made[since + 1 : step], 1)


def _at_most(program: Program, family: str, one: list[Integers], others: list[Integers]) -> None:
    """In each row, ``one`` is at most the sum of ``others``."""
    rows = np.arange(len(one[0]))
    columns = np.concatenate([*one, *others])
    signs = np.repeat([1, *[-1] * len(others)], len(rows))
    there = columns >= 0
    program.model.constrain(
        family,
        np.tile(rows, 1 + len(others))[there],
        columns[there],
        signs[there],
        "<=",
        np.zeros(len(rows)),
    )


def _never_more(program: Program, family: str, some: Integers, others: Integers, by: int) -> None:
    """The sum of ``some`` is at most that of ``others``, and ``by``."""
    some, others = some[some >= 0], others[others >= 0]
    if len(some) <= by:
        return
    signs = np.repeat([1, -1], [len(some), len(others)])
    program.model.constrain(family, 0, np.concatenate([some, others]), signs, "<=", [by])


# What makes an order one, and what makes a sequence one.
ORDER = (created_once, one_op_per_step, continuity, one_state, inputs_present, precedence)
SEQUENCE = (created, idle_first, continuity, one_state, overwritten, inputs_present, writes_in_turn, fetchable)
