"""The feature store and its pipelines; each command runs as `python -m feature_jobs.<name>`."""
