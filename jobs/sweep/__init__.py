"""Search hyper-parameters of any family with Ray Tune. The ledger has each trial, so a sweep continues after a kill."""
