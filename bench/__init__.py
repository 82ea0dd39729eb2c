"""The parts of benchmarks.py."""
