"""Rollouts. Pure functions over ledger events decide which version answers which unit."""
