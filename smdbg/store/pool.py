"""Shards to be used again: pages that a process has touched are written to much faster than fresh ones."""

from __future__ import annotations

import threading

from smdbg.store.shard import Shard


class ShardPool:
    """Keeps shards that the store has taken, up to `bound` bytes, for rows of the same layout."""

    def __init__(self, bound: int) -> None:
        """Start empty."""
        self._bound = bound
        self._held = 0
        self._free: dict[tuple[int, int, int], list[Shard]] = {}
        self._lock = threading.Lock()

    def take(self, chunk_bytes: int, present: int, total: int) -> Shard:
        """Return a shard of that layout, with anything in it: whoever fills it fills all of it."""
        with self._lock:
            free = self._free.get((chunk_bytes, present, total))
            if free:
                shard = free.pop()
                self._held -= len(shard.encoded)
                shard.reset()
                return shard
        return Shard(chunk_bytes, present, total)

    def give(self, shard: Shard) -> None:
        """Take a shard back that nobody reads any more."""
        size = len(shard.encoded)
        with self._lock:
            if self._held + size <= self._bound:
                self._held += size
                self._free.setdefault(shard.geometry, []).append(shard)
