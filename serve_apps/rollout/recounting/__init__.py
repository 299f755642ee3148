"""What a replay computes again from logs and texts."""
