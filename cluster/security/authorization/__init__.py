"""Authorization: decisions by Cedar policies, and the record of these decisions."""
