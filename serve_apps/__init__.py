"""Serving: the edge, the replicas, and the commands that move traffic between model versions."""
