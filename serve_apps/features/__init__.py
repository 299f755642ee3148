"""Features over HTTP: read online by key, and pushed by the applications that know them first."""
