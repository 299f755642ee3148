"""The edge: HAProxy's configuration as text, and the controller that keeps HAProxy in line with it."""
