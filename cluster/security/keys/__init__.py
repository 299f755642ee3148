"""Key-encryption keys: one protocol, an embedded keyring behind a broker, and HashiCorp Vault."""
