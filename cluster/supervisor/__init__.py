"""Restarts the dead parts of a cluster on this machine (docs/decisions/0031-one-small-supervisor.md)."""
