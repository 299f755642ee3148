"""The network family: Ray Train spreads it over workers, DeepSpeed shards it."""
