"""Text from a model, token by token, with a cache of what came before."""

from sightline.generation.text import SamplingConfig, Tokenizer, generate, stream

__all__ = ["SamplingConfig", "Tokenizer", "generate", "stream"]
