"""Conversion from and to Hugging Face directories: one file per family, and the code they share.

A format uses the fields of its family's config by name and does not import the config class or the model class; the
family's file imports its format.
"""
