"""The edge: HAProxy's configuration as text, and the controller that keeps it true."""
