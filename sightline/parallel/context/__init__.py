"""Context parallelism: rows divided among ranks, and only the keys that are needed sent between them."""
