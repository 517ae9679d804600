"""The selected KV store: ragged rows of fixed-size pages, changed in place and in transactions."""

from hamblocks.cache.store import KVCache, Stored
from hamblocks.cache.changes import transaction

__all__ = ["KVCache", "Stored", "transaction"]
