"""What runs on this machine for a cluster: its folders, its processes, and whether both are as they should be."""
