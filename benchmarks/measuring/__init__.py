"""Modules of benchmarks/gpu.py: clock, floors, checks, targets, tables, and the measured parts."""
