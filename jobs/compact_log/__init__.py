"""Compact the segments that replicas wrote into tables."""
