"""Batch scoring: predictions for many rows, written to files."""
