"""Tests of the parts of the benchmarks that could quietly falsify numbers."""
