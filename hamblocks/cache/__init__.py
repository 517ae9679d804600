"""The selected KV store: ragged rows of fixed-size pages, changed in place and in transactions."""

from hamblocks.cache.changes import cache_transaction
from hamblocks.cache.store import KVCache, Stored

__all__ = ["KVCache", "Stored", "cache_transaction"]
