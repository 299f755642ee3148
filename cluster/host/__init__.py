"""This machine: its processes, signals, ports and disk, and its node of a cluster."""
