"""Training: fit a model to a training set and register it as a version."""
