"""The inputs that checks draw: sizes, kinds and a seed, from which tensors are made."""
