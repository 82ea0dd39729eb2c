"""``olla place``: buffers with lifetimes into addresses."""

from __future__ import annotations

import argparse
from pathlib import Path

from olla.cli.options import Commands, add_command, add_time_limit
from olla.show.progress import stage

__all__ = ["add_to"]

_EXAMPLES = """\
  olla place buffers.csv --out placed.csv --draw placed.png
  olla place buffers.csv --capacity 1048576
"""


def add_to(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "place",
        _run,
        purpose="give buffers with known lifetimes addresses in one arena",
        examples=_EXAMPLES,
    )
    parser.add_argument("buffers", type=Path, metavar="FILE.csv", help="id,lower,upper,size[,alignment][,offset]")
    parser.add_argument(
        "--capacity", type=int, metavar="BYTES", help="what must suffice; default: as little as possible"
    )
    parser.add_argument("--alignment", type=int, default=1, metavar="BYTES", help="of all offsets; default %(default)s")
    add_time_limit(parser)
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="write the buffers with their offsets here")
    parser.add_argument("--draw", type=Path, metavar="FILE.png", help="draw the placement (needs matplotlib)")


def _run(options: argparse.Namespace) -> int:
    from olla.place.allocate import allocate  # loads the compiled kernels
    from olla.place.buffers import read_csv, write_csv

    buffers = read_csv(options.buffers)
    with stage(f"placing {len(buffers):,} buffers", None):
        placement = allocate(buffers, options.capacity, alignment=options.alignment, time_limit=options.time_limit)
    if options.out:
        write_csv(options.out, buffers, placement.offsets)
    if options.draw:
        from olla.show.draw import draw_placement

        draw_placement(buffers, placement, options.draw)
    print(f"arena        {placement.arena_bytes:>20,} bytes  ({placement.method}, {placement.seconds:.2f} s)")
    print(f"lower bound  {placement.lower_bound_bytes:>20,} bytes  ({placement.status}, gap {placement.gap:.4%})")
    return 0
