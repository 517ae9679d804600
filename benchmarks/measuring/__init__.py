"""What benchmarks/gpu.py is made of: a clock, floors, checks, targets, tables, and a file for each thing measured."""
