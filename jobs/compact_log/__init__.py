"""Move logged records from the replicas' segments into tables."""
