"""The controller, which applies changes of the ledger and of Serve to HAProxy."""
