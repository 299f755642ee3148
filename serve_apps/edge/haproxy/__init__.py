"""HAProxy's configuration as text: pure functions, no I/O but the issuer's key files."""
