"""TLS certificates of the local authority, the edge, the nodes and Vault's PKI."""
