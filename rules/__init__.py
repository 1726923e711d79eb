"""The rules that come with smdbg, one a file, and their packs."""
