"""Read source rows from files, SQL, JSON and Kafka; cast, check and quarantine them."""
