"""What rows of one batch size and one mode say together, as the paper's evaluation does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, median

from bench.cells import number, share
from bench.row import Row
from olla.order.baselines import INDUCTOR

PAPER = (
    "The paper's claim, not measured here: about one-third less memory on average (abstract of arXiv 2210.12924). For "
    "large graphs, its authors give the integer programs for the order and for the addresses 30 minutes each, and stop "
    "at gaps of 0.5 % and 0.1 %."
)


@dataclass(frozen=True, slots=True)
class Summary:
    """Means of shares, over the models; the times are those of the planners."""

    batch_size: int
    mode: str
    models: int
    order_saving: float  # live bytes of the planned order, against eager PyTorch's
    proven: int  # orders within 0.01 % of the best possible one
    worst_gap: float
    eager_loss: float  # of what CUDA's caching allocator would reserve, in eager PyTorch's order
    planned_loss: float  # in the planned order
    arena_loss: float  # of the arena
    total_saving: float  # reserved with an arena, against reserved for eager PyTorch
    planning: str  # median and worst, in seconds
    placing: str
    half_extra: float | None  # time, for half of the bytes, where that can be reached; of eager PyTorch's, estimated
    half_planning: str
    beaten: int  # other orders, of Inductor and of the program, that are better

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Summary:
        """Of simulated rows, which have one batch size and one mode."""
        gaps = [row.gap or 0.0 for row in rows]
        halves = [row for row in rows if row.half_extra is not None]
        others = [(row, getattr(row, f"inductor_{name}_bytes")) for row in rows for name in INDUCTOR]
        others += [(row, row.simulated_eager_bytes) for row in rows]
        return cls(
            batch_size=rows[0].batch_size,
            mode=rows[0].mode,
            models=len(rows),
            order_saving=mean(saved(row.simulated_planned_bytes, row.simulated_eager_bytes) for row in rows),
            proven=sum(gap <= 1e-4 for gap in gaps),
            worst_gap=max(gaps),
            eager_loss=mean(saved(row.simulated_eager_bytes, row.reserved_eager_bytes) for row in rows),
            planned_loss=mean(saved(row.simulated_planned_bytes, row.reserved_planned_bytes) for row in rows),
            arena_loss=mean(row.simulated_fragmentation or 0.0 for row in rows),
            total_saving=mean(saved(row.reserved_arena_bytes, row.reserved_eager_bytes) for row in rows),
            planning=_times([row.planning_seconds or 0.0 for row in rows]),
            placing=_times([row.placing_seconds or 0.0 for row in rows]),
            half_extra=mean(row.half_extra or 0.0 for row in halves) if halves else None,
            half_planning=_times([row.half_seconds or 0.0 for row in halves]) if halves else "-",
            beaten=sum(other < row.simulated_planned_bytes for row, other in others),
        )


SUMMARY_COLUMNS: dict[str, Callable[[Summary], str]] = {
    "mode": lambda summary: summary.mode,
    "batch": lambda summary: str(summary.batch_size),
    "models": lambda summary: number(summary.models),
    "saved by the order": lambda summary: share(summary.order_saving),
    "proven": lambda summary: number(summary.proven),
    "worst gap": lambda summary: share(summary.worst_gap, 4),
    "eager loses": lambda summary: share(summary.eager_loss),
    "planned order loses": lambda summary: share(summary.planned_loss),
    "arena loses": lambda summary: share(summary.arena_loss, 2),
    "saved in all": lambda summary: share(summary.total_saving),
    "planning s": lambda summary: summary.planning,
    "placing s": lambda summary: summary.placing,
    "half: more time": lambda summary: share(summary.half_extra),
    "half: planning s": lambda summary: summary.half_planning,
    "better orders": lambda summary: number(summary.beaten),
}


def summaries(rows: Iterable[Row]) -> list[Summary]:
    """Of the rows that are simulated, one for each mode and batch size, in training first."""
    return [Summary.of(of_panel) for of_panel in panels(row for row in rows if row.reserved_arena_bytes is not None)]


def panels(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows of one mode and one batch size together; training first."""
    found: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        found.setdefault((row.mode, row.batch_size), []).append(row)
    return [found[key] for key in sorted(found, key=lambda key: (key[0] != "train", key[1]))]


def saved(needed: int | None, before: int | None) -> float:
    """The share that is not needed any more."""
    return 1 - (needed or 0) / before if before else 0.0


def _times(seconds: Sequence[float]) -> str:
    return f"{median(seconds):.2f}, at most {max(seconds):.2f}"
