"""What the logs hold: the rows that count, and how they were made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from bench.contest import Result
from bench.models import MODELS
from bench.row import Row
from bench.soak import Moment


@dataclass(frozen=True, slots=True)
class Evidence:
    """Rows, the moments of a long run, and the results of contests: of peers, and of backends of ``torch.compile``."""

    rows: Sequence[Row]
    moments: Sequence[Moment] = ()
    peers: Sequence[Result] = ()
    compiled: Sequence[Result] = ()

    @property
    def simulated(self) -> list[Row]:
        """Rows of the whole evaluation, on a CPU or on none."""
        # With --quick, nobody asks what half costs: of two rows of one case, the one that knows counts.
        rows = sorted(self.rows, key=lambda row: row.half_extra is not None or row.smallest_bytes is not None)
        return _latest(rows, lambda row: row.device != "cuda" and row.reserved_arena_bytes is not None)

    @property
    def failed(self) -> list[Row]:
        """Rows of the whole evaluation that have an error instead of figures."""
        on_cpu = (row for row in self.rows if row.device != "cuda" and row.wanted_saving is None and not row.form)
        return [row for row in on_cpu if row.error]

    def measured(self, device: str = "cpu", *, tuned: bool = False) -> list[Row]:
        """Rows that ran without a budget, with a tuned malloc or without."""

        def belongs(row: Row) -> bool:
            ran = row.device == device and row.time_ratio is not None and row.wanted_saving is None
            return ran and ("--tuned-malloc" in row.options) is tuned

        return _latest(self.rows, belongs)

    @property
    def within_budgets(self) -> list[Row]:
        """Rows that ran within budgets, on a GPU; the largest budget first, and without spilling first."""
        rows = [row for row in self.rows if row.device == "cuda" and row.wanted_saving and row.time_ratio is not None]
        return sorted(rows, key=lambda row: (row.model, row.batch_size, "--spilling" in row.options, row.wanted_saving))

    @property
    def profiled(self) -> list[Row]:
        """Rows with what CUDA's caching allocator reserves, measured on a GPU."""
        return _latest(self.rows, lambda row: row.device == "cuda" and "--gpu-profile" in row.options)


def origin(rows: Sequence[Row | Moment | Result]) -> str:
    """Where, when and how the rows were made."""
    machines, dates = distinct(row.machine for row in rows), sorted({row.date for row in rows})
    commands = ", ".join(f"`{command}`" for command in distinct(row.command for row in rows))
    days = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"{'; '.join(machines)}; {days}; made by {commands}."


def distinct(texts: Iterable[str]) -> list[str]:
    """Each text once, in the order in which they occur."""
    return list(dict.fromkeys(texts))


def _latest(rows: Iterable[Row], belongs: Callable[[Row], bool]) -> list[Row]:
    """Of those that belong, the last one of each model, batch size and mode; in the order of the models."""
    found = {
        (row.model, row.batch_size, row.mode): row
        for row in rows
        if belongs(row) and not row.error and "--skip-node-ordering" not in row.options
    }
    places = {name: place for place, name in enumerate(MODELS)}
    return sorted(found.values(), key=lambda row: (places.get(row.model, -1), row.mode != "train", row.batch_size))
