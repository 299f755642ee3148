"""Outcomes: what came true, posted later by the application that asked for the prediction."""
