"""The cluster's folders and processes on this machine: starting, ending and checking them."""
