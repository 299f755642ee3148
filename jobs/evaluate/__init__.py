"""Evaluate a registered version: quality and calibration, overall and for each group of rows."""
