"""Sealed files and values, protected Parquet, and folders for what is in the clear for a while."""
