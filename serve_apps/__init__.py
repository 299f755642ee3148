"""What answers requests: the edge, the replicas, and the commands that move traffic between them."""
