"""What a policy of a rollout may say, as files declare it."""
