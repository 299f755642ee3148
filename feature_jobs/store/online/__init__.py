"""The online store: rows by entity in LMDB, Redis and files, and the reader."""
