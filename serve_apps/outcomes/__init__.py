"""Outcomes over HTTP: what came true of a prediction, posted later by the application that requested it."""
