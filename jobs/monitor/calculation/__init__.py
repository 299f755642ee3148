"""Figures of served rows, computed with NannyML from data in memory. Nothing here reads a log or writes a result."""
