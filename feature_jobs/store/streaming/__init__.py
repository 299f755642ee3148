"""Streams: pushes and Kafka messages into the feature table and the online store, exactly once."""
