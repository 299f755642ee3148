"""Signed tokens: who issues them, how they are verified, and the principal they speak of."""
