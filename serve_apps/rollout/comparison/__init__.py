"""What the commands `check` and `compare` find in the logs, without a policy."""
