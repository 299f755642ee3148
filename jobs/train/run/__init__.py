"""Runs: their ids, their settings in the ledger, their checkpoints and their metrics."""
