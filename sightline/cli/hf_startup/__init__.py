"""Folder that `sightline hf` puts first on PYTHONPATH: Python imports its `sitecustomize` when a process starts."""
