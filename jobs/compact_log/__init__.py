"""Compaction: what replicas logged line by line, as a table."""
