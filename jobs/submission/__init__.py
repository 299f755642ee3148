"""Jobs that callers submit at the edge: `POST /v1/jobs`."""
