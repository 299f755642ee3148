"""Jobs that train, sweep, evaluate, monitor and tie the whole loop together; a folder per job."""
