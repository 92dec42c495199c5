"""Context parallelism: the tokens of a row are sharded across ranks, which exchange only the keys that they need."""
