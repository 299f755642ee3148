"""The rows of a training set, read and encoded row group by row group, in an order that the seed determines."""
