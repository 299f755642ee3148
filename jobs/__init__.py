"""Jobs that train, tune, evaluate and monitor models, and the demo pipeline; one folder per job."""
