"""Runs commands at times of a calendar or after events (docs/decisions/0060-a-slot-runs-exactly-once.md)."""
