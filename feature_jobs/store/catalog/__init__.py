"""Definitions as plain specifications: in the ledger, compared, planned, and with their keys."""
