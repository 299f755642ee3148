"""Read a batch from its source, check it as a whole, and store it in a feature table, or mend stored batches."""
