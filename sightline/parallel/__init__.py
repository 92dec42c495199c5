"""Parallelism, applied to models from outside."""
