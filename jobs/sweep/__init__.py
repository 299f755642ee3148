"""Search hyper-parameters of the tabular network with Ray Tune: a few short trials."""
