"""A batch from its source into a feature table: read, judged as a whole, stored, mended."""
