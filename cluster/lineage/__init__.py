"""Lineage of model versions, back to the columns of their sources. It is computed from the ledger."""
