"""For people: progress, reports, pictures, pages and traces."""

from olla.show.formats import draw

__all__ = ["draw"]
