"""Features over HTTP: online reads by key, and pushes by the applications that know the values first."""
