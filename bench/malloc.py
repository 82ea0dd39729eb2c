"""The malloc of a fast eager PyTorch."""

import ctypes


def tune_malloc() -> None:
    """As MALLOC_MMAP_MAX_=0 and a huge MALLOC_TRIM_THRESHOLD_ do: memory never goes back to the system."""
    libc = ctypes.CDLL(None)
    trim_threshold, mmap_max = -1, -4  # malloc.h
    if not (hasattr(libc, "mallopt") and libc.mallopt(mmap_max, 0) and libc.mallopt(trim_threshold, 2**31 - 1)):
        raise SystemExit("--tuned-malloc needs the malloc of glibc")
