"""Key-encryption keys: one protocol and two stores, an embedded keyring and HashiCorp Vault."""
