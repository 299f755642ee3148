"""Evaluation of a registered version: quality, calibration, and the same for each group of people."""
