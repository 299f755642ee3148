"""Move a model version from one installation to another, as one signed file (a bundle).

`jobs.export_model` writes a bundle, `jobs.import_model` reads it. No part of a bundle is parsed before the
signature and the part's hash were verified.
"""
