"""What every replica shares: requests and answers, the check of tokens, records, load."""
