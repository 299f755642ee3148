"""Offline store: feature tables, the point-in-time join, training sets, and the removal of rows."""
