"""The pages that the logs write: docs/results.md, and what other pages have between markers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from bench import blocks, page
from bench.evidence import Evidence
from bench.picture import draw_contests, draw_peaks, draw_soak
from olla.errors import OllaError

__all__ = ["fill", "write_document"]


def write_document(evidence: Evidence, root: Path) -> list[Path]:
    """Write what stands between markers, from the logs, and pictures; returns the paths of what was written.

    What the logs hold nothing of stands there as it did.

    Raises
    ------
    OllaError
        If the logs hold nothing, or not enough of what belongs together, or a page lacks its markers; then nothing is
        written.
    """
    readme, folder = root / "README.md", root / "docs"
    results, cuda = folder / "results.md", folder / "cuda.md"
    found: dict[Path, dict[str, str]] = {readme: {}, results: {}, cuda: {}}
    pictures: dict[Path, Callable[[Path], None]] = {}
    if simulated := evidence.simulated:
        found[readme] |= {"quick": blocks.quick(evidence), "orders": blocks.orders(evidence)}
        pictures[folder / "results.png"] = partial(draw_peaks, simulated)
        found[results]["orders"] = page.orders(evidence, "results.png")
    if evidence.peers:
        found[readme]["peers"] = blocks.peers(evidence.peers)
        pictures[folder / "peers.png"] = partial(draw_contests, evidence.peers)
        found[results]["peers"] = page.contests(evidence.peers, "peers.png")
    if evidence.compiled:
        found[results]["compile"] = page.backends(evidence.compiled)
    if evidence.moments:
        pictures[folder / "soak.png"] = partial(draw_soak, evidence.moments)
        found[results]["soak"] = page.long_run(evidence.moments, "soak.png")
    if evidence.measured("cuda"):
        found[readme]["gpu"], found[cuda]["gpu"] = blocks.gpu_in_short(evidence), blocks.gpu(evidence)
    texts = {path: _filled(path, parts) for path, parts in found.items() if parts}
    if not texts:
        raise OllaError("the logs hold nothing: run benchmarks.py first, or say where they are (--log-path)")
    for path, draw in pictures.items():
        draw(path)
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    return [*texts, *pictures]


def _filled(path: Path, texts: Mapping[str, str]) -> str:
    text = path.read_text(encoding="utf-8")
    for name, content in texts.items():
        text = fill(text, name, content, path)
    return text


def fill(text: str, name: str, content: str, path: Path) -> str:
    """The text of a page, with other content between the markers of this name.

    Raises
    ------
    OllaError
        If the markers are not there, once; it names the ``path``.
    """
    begin, end = f"<!-- written: {name} -->", f"<!-- end of {name} -->"
    before, found, rest = text.partition(begin)
    _, ended, after = rest.partition(end)
    if not (found and ended) or begin in rest:
        raise OllaError(f"{path}: {begin} and, below it, {end} must stand there once, around what is to be written")
    return f"{before}{begin}\n{content}\n{end}{after}"
