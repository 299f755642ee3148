"""The nodes of a cluster: how a machine joins, gets keys and tokens from the head, and leaves."""
