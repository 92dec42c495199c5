"""From text to packed batches: sources, tokenizer, packers and loaders. Independent of the models."""

from sightline.data.data_loader import (
    Batches,
    DataLoader,
    IterableLoader,
    join_states,
    open_loader,
    open_validation,
)
from sightline.data.documents import Documents, split_documents
from sightline.data.loader import Loader, validation_batches
from sightline.data.patches import pack_patches, to_patches
from sightline.data.sources import is_dataset, load_documents
from sightline.data.synthetic_images import SYNTHETIC_IMAGES, ImageLoader
from sightline.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

__all__ = [
    "SYNTHETIC_IMAGES",
    "Batches",
    "DataLoader",
    "Documents",
    "ImageLoader",
    "IterableLoader",
    "Loader",
    "Tokenizer",
    "is_dataset",
    "join_states",
    "load_documents",
    "load_tokenizer",
    "open_loader",
    "open_validation",
    "pack_patches",
    "split_documents",
    "to_patches",
    "train_tokenizer",
    "validation_batches",
]
