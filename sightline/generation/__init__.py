"""Text generation with a key/value cache, for one prompt or a batch of prompts."""

from sightline.generation.sampling import SamplingConfig
from sightline.generation.text import generate, generate_batch, stream
from sightline.generation.tokens import Tokenizer

__all__ = ["SamplingConfig", "Tokenizer", "generate", "generate_batch", "stream"]
