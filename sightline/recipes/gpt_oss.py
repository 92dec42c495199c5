"""How each size of gpt-oss is trained."""

from __future__ import annotations

from sightline.recipes.laptop import debug, tiny
from sightline.recipes.llama3 import on_gpus

GPT_OSS_RECIPES = {
    "gpt_oss-debug": debug("gpt_oss-debug"),
    "gpt_oss-tiny": tiny("gpt_oss-tiny"),
    "gpt_oss-20b": on_gpus("gpt_oss-20b", learning_rate=2e-4),
    "gpt_oss-120b": on_gpus("gpt_oss-120b", learning_rate=1e-4),
}
