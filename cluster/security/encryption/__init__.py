"""Encryption of files, values and Parquet columns, and folders for temporary plaintext."""
