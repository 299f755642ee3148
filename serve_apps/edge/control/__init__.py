"""What keeps HAProxy true to the ledger and to Serve."""
