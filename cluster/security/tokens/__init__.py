"""Signed tokens: their issuers, their verification, and the principal that a token names."""
