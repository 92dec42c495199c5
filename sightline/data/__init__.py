"""Text in, packed batches out: sources, tokenizer, packers and the loader. Knows no models."""

from sightline.data.documents import Documents, split_documents
from sightline.data.images import SYNTHETIC_IMAGES, ImageLoader, pack_patches, to_patches
from sightline.data.loader import Loader, join_states, validation_batches
from sightline.data.packing import BestFit, Piece, Stream
from sightline.data.sources import load_documents
from sightline.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

__all__ = [
    "SYNTHETIC_IMAGES",
    "BestFit",
    "Documents",
    "ImageLoader",
    "Loader",
    "Piece",
    "Stream",
    "Tokenizer",
    "join_states",
    "load_documents",
    "load_tokenizer",
    "pack_patches",
    "split_documents",
    "to_patches",
    "train_tokenizer",
    "validation_batches",
]
