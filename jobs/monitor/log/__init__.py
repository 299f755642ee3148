"""Read what monitoring needs of the prediction log and the outcome log, by columns and chunk by chunk."""
