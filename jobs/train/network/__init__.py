"""Training of networks with Ray Train and DeepSpeed, for every family that has `build` and `loss`."""
