"""The plan and the measurement side by side, what the peak is made of, and what would help: for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from olla.errors import OllaError
from olla.graph.graph import Graph
from olla.graph.plan import Plan
from olla.measure.measurement import Measurement
from olla.run.arena import Counts
from olla.show.advice import advice
from olla.show.blocks import Block, origin
from olla.show.peak import Peak
from olla.show.size import format_bytes

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["Report"]

_SHOWN = 10  # storages at the peak
_NAMED = 3  # ops that run again
_COLUMNS = ("bytes", "storage", "kind", "made by", "of")


@dataclass(frozen=True, slots=True)
class Report:
    """What a step was planned to need and, if it was measured, what it needed. Print it."""

    graph: Graph
    plan: Plan
    measurement: Measurement | None
    not_executed: str = ""  # why addresses are not executed
    spilled_bytes: int = 0  # that the plan sends away, and fetches again
    counts: Counts | None = None  # how the allocations of the last step were answered

    def __str__(self) -> str:
        """A screen of plain text."""
        peak = Peak.of(self.graph, self.plan)
        lines = [
            *(f"{label:<11} {text}" for label, text in self._facts),
            "",
            *(f"{name:<18}{eager:>14}{planned:>14}{saved:>10}" for name, eager, planned, saved in self._figures),
            *self._remarks,
            "",
            self._peak_title(peak),
            *(
                f"{size:>12}  {storage:<28.28} {kind:<10} {op:<40.40} {line}".rstrip()
                for size, storage, kind, op, line in self._peak_rows(peak)
            ),
            *self._peak_rest(peak),
            "",
            "what would help",
            *(f"- {text}" for text in advice(self.graph, self.plan)),
        ]
        return "\n".join(lines)

    def to_markdown(self) -> str:
        """The same as :meth:`__str__`, in Markdown."""
        peak = Peak.of(self.graph, self.plan)
        parts = [
            "\n".join(f"- **{label}**: {text}" for label, text in self._facts),
            _table(self._figures),
            *self._remarks,
            self._peak_title(peak),
            _table([_COLUMNS, *self._peak_rows(peak)]),
            *self._peak_rest(peak),
            "what would help",
            "\n".join(f"- {text}" for text in advice(self.graph, self.plan)),
        ]
        return "\n\n".join(parts) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """The same, and all that is in memory at the peak, as JSON-ready data. Bytes and seconds."""
        plan, peak = self.plan, Peak.of(self.graph, self.plan)
        kept = (
            "method", "status", "seconds", "peak_bytes", "baseline_peak_bytes", "lower_bound_bytes", "persistent_bytes",
            "arena_bytes", "fragmentation", "extra_seconds", "extra_seconds_lower_bound",
        )  # fmt: skip
        return {
            "plan": {
                **{name: getattr(plan, name) for name in kept},
                "reused_bytes": sum(op.reused for op in self.graph.ops),
                "recomputed": [self.graph.ops[op].name for op in plan.recomputed],
                "spilled": [self.graph.storages[spill.storage].name for spill in plan.spills],
                "spilled_bytes": self.spilled_bytes,
                "not_executed": self.not_executed,
            },
            "measured": asdict(self.measurement) if self.measurement else None,
            "peak": {
                "step": peak.step,
                "op": peak.op.name if peak.op else None,
                "source": peak.op.source if peak.op else None,
                "storages": [self._described(block) for block in peak.blocks],
            },
            "advice": list(advice(self.graph, plan)),
        }

    def to_pandas(self) -> DataFrame:
        """All that is in memory at the peak, the largest first.

        Raises
        ------
        OllaError
            If pandas is not there.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise OllaError("to_pandas needs pandas: pip install pandas") from error
        columns = ["storage", "bytes", "kind", "op", "source", "backward", "start", "end"]
        return pd.DataFrame(self.to_dict()["peak"]["storages"], columns=columns)

    def _described(self, block: Block) -> dict[str, Any]:
        op = self.graph.ops[block.op]
        return {
            "storage": block.name, "bytes": block.size, "kind": block.kind.value, "op": op.name, "source": op.source,
            "backward": op.backward, "start": block.start, "end": block.end,
        }  # fmt: skip

    @property
    def _facts(self) -> Iterator[tuple[str, str]]:
        plan = self.plan
        yield "order", f"{plan.method}; planned in {plan.seconds:.2f} s"
        yield "proof", self._proof
        persistent = format_bytes(plan.persistent_bytes)
        yield "persistent", f"{persistent} (parameters, buffers, optimizer state, inputs)"
        yield "addresses", self._addresses
        reused = [op.reused for op in self.graph.ops if op.reused]
        if reused:
            yield "reused", f"{len(reused):,} results over inputs, {format_bytes(sum(reused))} in all"
        if plan.recomputed:
            yield "recomputed", f"{len(plan.recomputed):,} ops again: {self._repeats}"
        if plan.spills:
            moved = format_bytes(self.spilled_bytes)
            yield "spilled", f"{len(plan.spills):,} storages, {moved} away and back"
        if plan.recomputed or plan.spills:
            least = plan.extra_seconds_lower_bound  # 0: not known
            yield "extra time", f"{plan.extra_seconds:.4f} s expected" + (f", {least:.4f} s at least" if least else "")

    @property
    def _proof(self) -> str:
        plan, bound = self.plan, format_bytes(self.plan.lower_bound_bytes)
        if plan.recomputed or plan.spills:
            return f"nothing needs less than {bound}; for the time, see below"
        if plan.peak_bytes == plan.lower_bound_bytes:
            return f"{plan.status}: no order needs less than {bound}"
        return f"{plan.status}: at most {plan.gap:.2%} above {bound}, which no order can beat"

    @property
    def _repeats(self) -> str:
        often = Counter(self.graph.ops[op].name for op in self.plan.recomputed).most_common()
        named = [f"{count} x {name}" for name, count in often[:_NAMED]]
        return ", ".join([*named, "and others"] if len(often) > _NAMED else named)

    @property
    def _figures(self) -> list[tuple[str, ...]]:
        plan, measured = self.plan, self.measurement
        peaks = (format_bytes(plan.baseline_peak_bytes), format_bytes(plan.peak_bytes))
        rows: list[tuple[str, ...]] = [
            ("peak above it", "eager", "planned", "saved"),
            ("simulated", *peaks, f"{plan.saving:.1%}"),
        ]
        if measured is not None:
            peaks = (format_bytes(measured.baseline_peak_bytes), format_bytes(measured.peak_bytes))
            rows.append((f"measured ({measured.device})", *peaks, f"{measured.saving:.1%}"))
            seconds = (f"{measured.baseline_step_seconds:.4f}", f"{measured.step_seconds:.4f}")
            rows.append(("seconds per step", *seconds, f"{measured.time_ratio:.2f} x"))
        return rows

    @property
    def _remarks(self) -> list[str]:
        plan, measured, lines = self.plan, self.measurement, []
        if measured is None:
            return ["measured            not yet: call step.measure(...)"]
        if measured.spilled_bytes:
            lines.append(f"spilled, measured   {format_bytes(measured.spilled_bytes)}, {measured.spill_seconds:.4f} s")
        if measured.exact:
            lines.append("the measured peak is the planned one, to the byte")
        elif measured.peak_bytes:
            off = measured.peak_bytes / plan.peak_bytes - 1 if plan.peak_bytes else float("inf")
            lines.append(f"the measured peak is {off:+.1%} off the planned one (workspaces of operators)")
        return lines

    def _peak_title(self, peak: Peak) -> str:
        if peak.op is None:
            return "at the peak, the end of the step: its outputs"
        of = origin(peak.op)
        return f"at the peak, step {peak.step} of {len(self.plan.order)}: {peak.op.name}" + (f" ({of})" if of else "")

    def _peak_rows(self, peak: Peak) -> list[tuple[str, ...]]:
        shown = peak.blocks[:_SHOWN]
        ops = [self.graph.ops[block.op] for block in shown]
        return [
            (format_bytes(block.size), block.name, block.kind.value, op.name, origin(op))
            for block, op in zip(shown, ops, strict=True)
        ]

    def _peak_rest(self, peak: Peak) -> list[str]:
        rest = [block.size for block in peak.blocks[_SHOWN:]]
        return [f"{format_bytes(sum(rest)):>12}  in {len(rest):,} others"] if rest else []

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


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Rows, the first of which is the header, as a table in Markdown."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
