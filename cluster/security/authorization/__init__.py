"""Who may do what: Cedar policies, and what of their decisions is recorded."""
