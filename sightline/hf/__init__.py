"""Packed attention for the models of transformers: importing this package registers attn_implementation=\"sightline\"."""
