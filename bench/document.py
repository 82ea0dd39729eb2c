"""The pages that the logs write: docs/results.md, and what other pages have between markers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bench import blocks
from bench.evidence import Evidence
from bench.page import page_of
from bench.picture import draw_contests, draw_peaks, draw_soak
from olla.errors import OllaError

__all__ = ["fill", "write_document"]


def write_document(evidence: Evidence, root: Path) -> list[Path]:
    """Write docs/results.md and its pictures, and what stands between markers elsewhere; returns the paths.

    What was run on a GPU, and peers, stand there as they did if the logs hold none.

    Raises
    ------
    OllaError
        If the logs do not have what belongs there, or a page lacks its markers; then nothing is written.
    """
    readme, folder = root / "README.md", root / "docs"
    in_readme = {"quick": blocks.quick(evidence), "orders": blocks.orders(evidence)}
    in_cuda: dict[str, str] = {}
    if evidence.peers:
        in_readme["peers"] = blocks.peers(evidence.peers)
    if evidence.measured("cuda"):
        in_readme["gpu"], in_cuda["gpu"] = blocks.gpu_in_short(evidence), blocks.gpu(evidence)
    results, cuda = folder / "results.md", folder / "cuda.md"
    pictures = {name: folder / f"{name}.png" for name in ("results", "soak", "peers")}
    texts = {
        readme: _filled(readme, in_readme),
        results: page_of(evidence, **{name: path.name for name, path in pictures.items()}),
        **({cuda: _filled(cuda, in_cuda)} if in_cuda else {}),
    }
    written = [*texts, pictures["results"]]
    draw_peaks(evidence.simulated, pictures["results"])
    if evidence.moments:
        draw_soak(evidence.moments, pictures["soak"])
        written.append(pictures["soak"])
    if evidence.peers:
        draw_contests(evidence.peers, pictures["peers"])
        written.append(pictures["peers"])
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    return written


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
