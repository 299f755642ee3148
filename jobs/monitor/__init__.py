"""Monitor served models with NannyML: estimated and realised performance, drift, and shares of nulls and new values."""
