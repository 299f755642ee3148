"""Pushes and Kafka messages into the table and the online store, exactly once."""
