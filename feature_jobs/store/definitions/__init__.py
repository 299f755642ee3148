"""Definitions of features, as plain objects without I/O."""
