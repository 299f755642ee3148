"""Rollouts: which version answers which unit, decided by pure functions over ledger events."""
