"""Code that all replicas share: HTTP requests and answers, token checks, record logs, load."""
