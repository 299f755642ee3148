"""Skew: comparison of served features with the features from offline data."""
