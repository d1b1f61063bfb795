"""Throughput benchmarks: contestants alternate in one run; each ends in one JSON line."""
