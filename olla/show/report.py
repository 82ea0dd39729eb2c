"""The plan and the measurement side by side, for people."""

from __future__ import annotations

from dataclasses import dataclass

from olla.graph.plan import Plan
from olla.measure.measurement import Measurement
from olla.run.arena import Counts

__all__ = ["Report", "format_bytes"]


@dataclass(frozen=True, slots=True)
class Report:
    """What a step was planned to need and, if it was measured, what it needed. Print it."""

    plan: Plan
    measurement: Measurement | None
    not_executed: str = ""  # why addresses are not executed
    spilled_bytes: int = 0  # that the plan sends away, and fetches again
    counts: Counts | None = None  # how the allocations of the last step were answered

    def __str__(self) -> str:
        """A table of plain text."""
        plan, measured = self.plan, self.measurement
        bound = format_bytes(plan.lower_bound_bytes)
        lines = [
            f"order       {plan.method}; planned in {plan.seconds:.2f} s",
            f"proof       {plan.status}: at most {plan.gap:.2%} above {bound}, which no order can beat",
            f"persistent  {format_bytes(plan.persistent_bytes)} (parameters, buffers, optimizer state, inputs)",
            f"addresses   {self._addresses}",
            *self._traded,
            "",
            _row("peak above it", "eager", "planned", "saved"),
            _row(
                "simulated",
                format_bytes(plan.baseline_peak_bytes),
                format_bytes(plan.peak_bytes),
                f"{plan.saving:.1%}",
            ),
        ]
        if measured is None:
            return "\n".join([*lines, "measured            not yet: call step.measure(...)"])
        lines.append(
            _row(
                f"measured ({measured.device})",
                format_bytes(measured.baseline_peak_bytes),
                format_bytes(measured.peak_bytes),
                f"{measured.saving:.1%}",
            )
        )
        lines.append(
            _row(
                "seconds per step",
                f"{measured.baseline_step_seconds:.4f}",
                f"{measured.step_seconds:.4f}",
                f"{measured.time_ratio:.2f} x",
            )
        )
        if measured.spilled_bytes:
            lines.append(f"spilled, measured   {format_bytes(measured.spilled_bytes)}, {measured.spill_seconds:.4f} s")
        if measured.exact:
            lines.append("the measured peak is the planned one, to the byte")
        elif measured.peak_bytes:
            off = measured.peak_bytes / plan.peak_bytes - 1 if plan.peak_bytes else float("inf")
            lines.append(f"the measured peak is {off:+.1%} off the planned one (workspaces of operators)")
        return "\n".join(lines)

    @property
    def _traded(self) -> list[str]:
        """What the budget costs."""
        plan, lines = self.plan, []
        if plan.recomputed:
            lines.append(f"recomputed  {len(plan.recomputed):,} ops again")
        if plan.spills:
            moved = format_bytes(self.spilled_bytes)
            lines.append(f"spilled     {len(plan.spills):,} storages, {moved} away and back")
        if lines:
            lines.append(
                f"extra time  {plan.extra_seconds:.4f} s expected, {plan.extra_seconds_lower_bound:.4f} s at least"
            )
        return lines

    @property
    def _addresses(self) -> str:
        if self.not_executed:
            return f"not executed: {self.not_executed}"
        plan = self.plan
        if plan.arena_bytes is None:
            return "after the first steps, which find out what the operators allocate"
        text = f"in one arena of {format_bytes(plan.arena_bytes)}, {plan.fragmentation:.2%} of it fragmentation"
        counts = self.counts
        if counts is None:
            return text
        return (
            f"{text}; {counts.hits:,} allocations at planned addresses, {counts.outside} outside as planned, "
            f"{counts.missed} missed, {counts.escapes} escaped, {counts.foreign} of other threads"
        )


def _row(name: str, eager: str, planned: str, saved: str) -> str:
    return f"{name:<18}{eager:>14}{planned:>14}{saved:>10}"


def format_bytes(size: int) -> str:
    """``size`` in MiB (GiB from 10 GiB up)."""
    if size >= 10 * 2**30:
        return f"{size / 2**30:,.2f} GiB"
    return f"{size / 2**20:,.2f} MiB"
