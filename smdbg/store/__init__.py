"""The on-disk format: writing it, reading it, checking it."""
