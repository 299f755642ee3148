"""Monitoring: NannyML over what was predicted, with and without outcomes."""
