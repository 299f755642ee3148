"""What a policy of a rollout says, as files declare it, and what commands do with it."""
