"""Column types, casts between them, and the names of the platform's own columns."""
