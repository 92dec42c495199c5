"""Mask rules. Each returns an AttentionMask; combine them with & (intersection) and | (union).

    causal(B, S) & document(ids)                              packed language modeling
    sliding_window(B, S, 4096) & document(ids)                Mistral, gpt-oss
    chunked(positions, 8192) & causal(B, S) & document(ids)   Llama 4
    (prefix_lm(positions, lengths) | causal(B, S)) & document(ids)

Every rule costs O(S K), or O(S log S) if it looks up documents by id or keys by position; a rule that costs more says
so. A new rule is added in one of the modules: the function, and its name in the module's `__all__`.
"""

from __future__ import annotations

from collections.abc import Callable

from sightline.masks.mask import AttentionMask
from sightline.masks.rules import combine, documents, sparse, trees, windows
from sightline.masks.rules.combine import *  # noqa: F403
from sightline.masks.rules.documents import *  # noqa: F403
from sightline.masks.rules.sparse import *  # noqa: F403
from sightline.masks.rules.trees import *  # noqa: F403
from sightline.masks.rules.windows import *  # noqa: F403

RULES: dict[str, Callable[..., AttentionMask]] = {
    name: vars(module)[name] for module in (documents, windows, sparse, trees, combine) for name in module.__all__
}
"""All rules by name: exported by `sightline.masks`, and callable in mask expressions on the command line."""
