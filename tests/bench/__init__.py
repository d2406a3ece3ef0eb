"""Benchmarks: ratios taken in one run on one machine (`make bench`). No test depends on a clock."""
