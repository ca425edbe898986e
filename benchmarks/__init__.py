"""Measurements of fastdpo against its strongest peer: `python -m benchmarks step` runs them, `table` prints them.

benchmarks imports the packages and never tests/; nothing in the packages imports benchmarks.
"""
