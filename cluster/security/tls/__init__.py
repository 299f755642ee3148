"""Certificates: the local authority's, the edge's, the nodes', and those from Vault."""
