"""HAProxy's configuration as text: pure functions. The only I/O is that of the issuer's key files."""
