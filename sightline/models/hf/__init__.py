"""Hugging Face directories: a file for each family's format, and what all of them share.

A format knows its family's config by the names of its fields, and neither the config's class nor the model's: the
family's file imports its format, and not the other way round.
"""
