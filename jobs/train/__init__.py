"""Training: from a training set to a registered model version."""
