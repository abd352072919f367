"""Benchmarks: named cases, a gate on correctness, and measurements as rows of JSON."""
