"""The decoder family: a causal language model of bytes, trained on text files."""
