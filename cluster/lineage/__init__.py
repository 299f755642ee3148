"""Lineage of model versions, down to the columns of their sources, computed from the ledger."""
