"""How each size of DeepSeek V3 is trained.

On GPUs with the peak learning rates of V2 Lite (arXiv 2405.04434) and V3 (arXiv 2412.19437).
"""

from __future__ import annotations

from sightline.config import Optimizer, Training, Validation
from sightline.recipes.llama3 import on_gpus, on_laptop

DEEPSEEK_V3_RECIPES = {
    "deepseek_v3-debug": on_laptop(
        "deepseek_v3-debug",
        training=Training(steps=50, sequence_length=256, global_batch_size=4, micro_batch_size=4),
        optimizer=Optimizer(learning_rate=3e-3, warmup_steps=5),
        validation=Validation(every=25, rows=4),
        every=25,
    ),
    "deepseek_v3-tiny": on_laptop(
        "deepseek_v3-tiny",
        training=Training(steps=150, sequence_length=1024, global_batch_size=2, micro_batch_size=2),
        optimizer=Optimizer(learning_rate=2e-3, warmup_steps=20),
        validation=Validation(every=25, rows=8),
        every=50,
    ),
    "deepseek_v3-16b": on_gpus("deepseek_v3-16b", learning_rate=4.2e-4),
    "deepseek_v3-671b": on_gpus("deepseek_v3-671b", learning_rate=2.2e-4),
}
