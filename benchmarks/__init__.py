"""Benchmarks: ratios of things run side by side. `python -m benchmarks --help`, or `make bench`."""
