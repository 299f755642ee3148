"""Hydra configuration groups, found as `pkg://configs` from any folder."""
