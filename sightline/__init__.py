"""Sightline: train language models on packed documents. What each token may see is data."""

from sightline.batch import Batch

__version__ = "0.2.0"
__all__ = ["Batch", "__version__"]
