"""The controller that keeps HAProxy in line with the ledger and Serve."""
