"""Measurements: python -m benchmarks.bench_<theme>; results with hardware, versions and command in benchmarks/results/."""
