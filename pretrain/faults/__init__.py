"""What is done about steps that fail, ranks that hang, bad shards, full memory and requests to stop."""
