"""What the edges count from their access records, and the database of it."""
