"""Shared parts of all replicas: HTTP requests and answers, token checks, record logs, load."""
