"""Buffers with known lifetimes get addresses in one arena. PyTorch is not loaded."""

import random

import olla

draw = random.Random(0)
starts = [draw.randrange(200) for _ in range(300)]
buffers = [
    olla.Buffer(start, start + draw.randrange(1, 30), 64 * draw.randrange(1, 65), alignment=64, name=f"tensor {i}")
    for i, start in enumerate(starts)
]

placement = olla.allocate(buffers, time_limit=10)
print(f"apart {sum(buffer.size for buffer in buffers):,} bytes, in one arena {placement.arena_bytes:,}")
print(f"at least {placement.lower_bound_bytes:,}: {placement.status}, gap {placement.gap:.2%}")
for buffer, offset in list(zip(buffers, placement.offsets, strict=True))[:3]:
    print(f"{buffer.name} is at {offset:,} while {buffer.lower} <= t < {buffer.upper}")

try:
    olla.allocate(buffers, placement.lower_bound_bytes - 1)
except olla.InfeasibleError as error:
    print(error)
