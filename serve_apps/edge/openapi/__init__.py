"""The OpenAPI document that the edge serves: plain data, built by pure functions."""
