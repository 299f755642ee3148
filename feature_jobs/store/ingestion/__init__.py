"""From source rows to checked rows: files, SQL, JSON; casts, rules, quarantine."""
