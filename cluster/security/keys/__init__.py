"""Key-encryption keys: one protocol, with two stores. An embedded keyring behind a broker, and HashiCorp Vault."""
