"""HAProxy's configuration as text: pure functions."""
