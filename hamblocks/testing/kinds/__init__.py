"""The checks, one page per kind of part."""
