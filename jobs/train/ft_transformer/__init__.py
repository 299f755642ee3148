"""The FT-Transformer family: a transformer over the columns of a row (Gorishniy et al. 2021, arXiv 2106.11959)."""
