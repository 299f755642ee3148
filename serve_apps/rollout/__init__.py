"""Rollouts: who gets which version, decided by pure functions over ledger events."""
