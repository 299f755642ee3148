"""Windowed aggregations: intervals, exact sums, tiles and their summaries."""
