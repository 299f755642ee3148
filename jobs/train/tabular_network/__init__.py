"""The tabular network family: Ray Train starts the workers, DeepSpeed shards the model over them."""
