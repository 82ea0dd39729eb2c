"""The whole trade: how much time each byte budget costs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from olla.errors import InfeasibleError, InvalidBudgetError
from olla.fit.fitting import Fitting
from olla.fit.spill import Bandwidth
from olla.graph.graph import Graph
from olla.graph.lifetimes import eager_peak_bytes
from olla.graph.plan import Schedule, extra_runs

__all__ = ["Frontier", "frontier"]


@dataclass(frozen=True, slots=True)
class Frontier:
    """Schedules within smaller and smaller budgets, and what they are compared with. Print it."""

    schedules: tuple[Schedule, ...]  # first an order, without repeats or spills; last the smallest peak found
    baseline_peak_bytes: int  # of eager PyTorch
    persistent_bytes: int  # part of a budget, and not of a peak
    seconds: float  # of all ops, run once

    @classmethod
    def of(cls, graph: Graph, schedules: Sequence[Schedule], seconds: Sequence[float]) -> Frontier:
        """The curve through these ``schedules`` of ``graph``, whose ops take ``seconds``."""
        return cls(tuple(schedules), eager_peak_bytes(graph), graph.persistent_bytes, sum(seconds))

    def __str__(self) -> str:
        """A table of plain text."""
        lines = [f"{'peak, bytes':>16}{'of eager':>10}{'more time':>11}{'at least':>10}{'ops again':>11}{'spilled':>9}"]
        for found in self.schedules:
            share = found.peak_bytes / (self.baseline_peak_bytes or 1)
            more, least = (s / (self.seconds or 1) for s in (found.extra_seconds, found.extra_seconds_lower_bound))
            again, spilled = len(extra_runs(found.order)), len(found.spills)
            lines.append(f"{found.peak_bytes:>16,}{share:>10.1%}{more:>11.1%}{least:>10.1%}{again:>11,}{spilled:>9,}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """What the table shows, as JSON-ready data. Bytes and seconds."""
        return {
            "baseline_peak_bytes": self.baseline_peak_bytes,
            "persistent_bytes": self.persistent_bytes,
            "seconds": self.seconds,
            "points": [
                {
                    "peak_bytes": found.peak_bytes,
                    "extra_seconds": found.extra_seconds,
                    "extra_seconds_lower_bound": found.extra_seconds_lower_bound,
                    "recomputed": len(extra_runs(found.order)),
                    "spilled": len(found.spills),
                }
                for found in self.schedules
            ],
        }


def frontier(
    graph: Graph,
    start: Schedule,
    seconds: Sequence[float],
    *,
    bandwidth: Bandwidth | None = None,
    points: int = 12,
    time_limit: float = 60.0,
) -> Frontier:
    """The curve from ``start`` to the smallest peak that can be reached.

    Parameters
    ----------
    graph, start, seconds, bandwidth
        As for :func:`olla.fit.fitting.fitted`.
    points
        How many budgets are looked at, both ends included.
    time_limit
        Seconds for all of them.

    Raises
    ------
    InvalidBudgetError
        If there are fewer than two points.
    """
    if points < 2:
        raise InvalidBudgetError(f"points is {points}: a curve has two ends, ask for at least 2")
    work = Fitting(graph, start, seconds, bandwidth=bandwidth)
    limit = time_limit / (2 * points)
    try:
        # Not more, so that who then asks for that budget, with the same limit, has the time to find it.
        least = work.within(0, time_limit=time_limit / 4).peak_bytes
    except InfeasibleError as error:
        least = error.best_bytes
    budgets = [least + (start.peak_bytes - least) * step // (points - 1) for step in range(points)]
    # What fits a smaller budget fits a larger one, too, so none of these takes more extra time than those before it.
    found = [work.within(budget, time_limit=limit) for budget in sorted({*budgets, start.peak_bytes})]
    return Frontier.of(graph, list(_falling(reversed(found))), seconds)


def _falling(found: Iterable[Schedule]) -> Iterator[Schedule]:
    """Those with a smaller peak than all before."""
    least = None
    for one in found:
        if least is None or one.peak_bytes < least:
            least = one.peak_bytes
            yield one
