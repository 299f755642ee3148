"""Lineage: a fold over the ledger from a model version to the columns of its sources."""
