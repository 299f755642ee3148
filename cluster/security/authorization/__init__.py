"""Authorization: Cedar policies, and which of their decisions are recorded."""
