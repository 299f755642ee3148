"""Starts again what has died of a cluster on this machine (docs/decisions/0001-supervisor.md)."""
