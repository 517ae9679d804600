"""The ops that the parts are made of (the package `hamblocks_ops`, re-exported)."""

from hamblocks_ops import *  # noqa: F403
from hamblocks_ops import __all__ as __all__
