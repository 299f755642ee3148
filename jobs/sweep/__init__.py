"""A sweep: a few short trials of a model family's hyper-parameters with Ray Tune."""
