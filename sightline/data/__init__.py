"""Text in, packed batches out: sources, tokenizer, packers and the loader. Knows no models."""

from sightline.data.documents import Documents, split_documents
from sightline.data.loader import Loader, validation_batches
from sightline.data.packing import BestFit, Piece, Stream
from sightline.data.sources import load_documents
from sightline.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

__all__ = [
    "BestFit",
    "Documents",
    "Loader",
    "Piece",
    "Stream",
    "Tokenizer",
    "load_documents",
    "load_tokenizer",
    "split_documents",
    "train_tokenizer",
    "validation_batches",
]
