"""How each size of DeepSeek V3 is trained.

On GPUs with the peak learning rates of V2 Lite (arXiv 2405.04434) and V3 (arXiv 2412.19437).
"""

from __future__ import annotations

from sightline.recipes.laptop import debug, tiny
from sightline.recipes.llama3 import on_gpus

DEEPSEEK_V3_RECIPES = {
    "deepseek_v3-debug": debug("deepseek_v3-debug"),
    "deepseek_v3-tiny": tiny("deepseek_v3-tiny"),
    "deepseek_v3-16b": on_gpus("deepseek_v3-16b", learning_rate=4.2e-4),
    "deepseek_v3-671b": on_gpus("deepseek_v3-671b", learning_rate=2.2e-4),
}
