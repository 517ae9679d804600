"""Experiments: tasks, training, and what `hamblocks demo` runs."""
