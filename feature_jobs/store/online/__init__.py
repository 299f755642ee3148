"""Online store: one row for each entity in LMDB, Redis and files, and the reader."""
