"""One model version as a Serve application: verify, load, read features, predict, log, answer."""
