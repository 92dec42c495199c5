"""Text generation, token by token, with a key/value cache."""

from sightline.generation.text import SamplingConfig, Tokenizer, generate, stream

__all__ = ["SamplingConfig", "Tokenizer", "generate", "stream"]
