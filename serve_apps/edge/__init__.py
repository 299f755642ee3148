"""The edge: HAProxy's configuration as text, and the controller that applies the ledger and Serve to HAProxy."""
