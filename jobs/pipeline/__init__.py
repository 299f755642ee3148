"""Pipelines: stages that configuration declares, each one a command, run as Ray jobs in the order of their inputs."""
