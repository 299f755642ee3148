"""Starts again what has died of a cluster on this machine (docs/decisions/0031-one-small-supervisor.md)."""
