"""Column types, casts between them, and the names of the columns that the platform adds."""
