"""Applied definitions: their records in the ledger, specifications to read them, change plans, and encryption keys."""
