"""How good a model version is on rows it has not seen: metrics, calibration and slices."""
