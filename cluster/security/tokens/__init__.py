"""Signed tokens: issuers, verification, and the principal that a token names."""
