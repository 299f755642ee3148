"""Boosted trees by row groups and in segments."""
