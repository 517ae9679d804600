"""The paged KV cache of the tokens that a selector stores: changed in place, with transactions."""

from hamblocks.cache.changes import cache_transaction, dry_run
from hamblocks.cache.extension import Extension, Stored
from hamblocks.cache.store import CacheSizes, KVCache

__all__ = ["CacheSizes", "Extension", "KVCache", "Stored", "cache_transaction", "dry_run"]
