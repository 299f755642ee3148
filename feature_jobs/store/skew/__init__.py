"""Served features beside those that offline data gives."""
