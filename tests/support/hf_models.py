"""Random and tiny models of transformers, of every causal class, and packed rows for the tests of sightline.hf."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 128
MAX_PARAMETERS = 8_000_000
SCALE = 0.2
"""Standard deviation of the weights: large enough that each token another attends to changes its logits."""


def names(value: Any, fields: str) -> dict[str, Any]:
    return dict.fromkeys(fields.split(), value)


TINY: dict[str, Any] = {
    **names(
        64, "hidden_size n_embd d_model dim embed_dim embedding_size word_embed_proj_dim lru_width out_hidden_size"
    ),
    **names(64, "output_dim projection_dim vision_output_dim cross_attention_hidden_size backbone_hidden_size"),
    **names(4, "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_blocks"),
    **names(2, "depth"),
    **names(96, "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner intermediate_size_mlp"),
    **names(96, "ffn_hidden_size dense_intermediate_size"),
    **names(VOCABULARY, "vocab_size vocab_size_per_layer_input"),
    **names(256, "max_position_embeddings n_positions max_seq_len"),
    **names(SCALE, "initializer_range init_std initializer_factor"),
    **names(4, "num_attention_heads n_head n_heads num_heads swa_num_attention_heads encoder_attention_heads"),
    **names(4, "decoder_attention_heads decoder_num_attention_heads"),
    **names(2, "num_key_value_heads swa_num_key_value_heads num_global_key_value_heads"),
    **names(16, "head_dim global_head_dim swa_head_dim"),
    **names(8, "sliding_window attention_chunk_size attention_window_size window_size rotary_dim"),
    **names(2, "max_window_layers"),
    **names(16, "hidden_size_per_layer_input"),
    **names(32, "q_lora_rank kv_lora_rank"),
    **names(8, "qk_rope_head_dim qk_nope_head_dim"),
    **names(12, "v_head_dim"),
    **names(64, "index_topk"),
    **names(2, "index_n_heads"),
    **names(16, "index_head_dim"),
    **names(4, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    **names(2, "num_experts_per_tok num_experts_per_token moe_topk n_group"),
    **names(32, "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size"),
    **names(1, "n_shared_experts first_k_dense_replace topk_group num_dense_layers moe_layer_start_index"),
    **names(0, "num_nextn_predict_layers num_kv_shared_layers"),
    **names(2, "linear_num_key_heads"),
    **names(4, "linear_num_value_heads linear_num_heads"),
    **names(16, "linear_key_head_dim linear_value_head_dim linear_head_dim mamba_d_head mamba_d_state mamba_head_dim"),
    **names(16, "ssm_state_size state_size chunk_size"),
    **names(8, "mamba_n_heads mamba_num_heads"),
    **names(1, "n_groups mamba_n_groups"),
    **names(16, "image_size"),
    **names(4, "patch_size"),
    **names(
        0.0, "attention_dropout attention_probs_dropout_prob attn_pdrop hidden_dropout_prob hidden_dropout dropout"
    ),
    **names(0.0, "activation_dropout embd_pdrop emb_pdrop embed_dropout resid_pdrop resid_dropout layerdrop"),
    **names(True, "use_sliding_window"),
    **names(False, "use_mem_eff_path"),
    **names([], "mlp_only_layers"),
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
"""Fields of configurations and the values that make a model tiny and two forwards equal; a field that a configuration
does not have, or leaves at None, is not set."""
ALSO_WHEN_NONE = names(
    None,
    "pad_token_id bos_token_id eos_token_id sliding_window head_dim num_key_value_heads num_experts_per_tok"
    " n_routed_experts n_shared_experts",
).keys()
"""Fields of `TINY` that are set where a configuration leaves them at None."""
DEFAULT = object()
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "bailing_hybrid": {"num_expert_group": 2, "head_dim": 8},
    "blt": {"encoder_hash_byte_group_size": [3, 4], "encoder_hash_byte_group_vocab": 64},
    "blt_local_encoder": {"hidden_size_global": 64},
    "blt_local_decoder": {"hidden_size_global": 64},
    "cohere_compass_text": {
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "rope_parameters": {
            "full_attention": None,
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    "cpmant": {"dim_head": 16, "dim_ff": 96, "prompt_length": 4},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 96},
    },
    "deepseek_v4": {"o_lora_rank": 32, "o_groups": 2, "num_key_value_heads": 1, "head_dim": 16},
    "dots3_note_text": {
        "shared_experts_intermediate_size": 32,
        **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 32, "swa_kv_lora_rank": 32},
        **{"swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 12},
    },
    "ernie4_5_moe": {"moe_k": 2},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3": {"mm_tokens_per_image": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "hunyuan_v1_dense": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "llama4_vision_model": {"intermediate_size": 256, **names(64, "projector_input_dim projector_output_dim")},
    "longcat_flash": {"head_dim": 8, "zero_expert_num": 2, "expert_ffn_hidden_size": 32},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "qwen4_exp_text": {
        **{"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 64},
        **{"indexer_compress_ratio": 4, "ple_embed_dim": 64, "hc_lowrank": 16},
    },
    "qwen2_5_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}},
    "qwen3_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}},
    "qwen3_vl_vision": {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16},
    "reformer": {"axial_pos_shape": [16, 16], "axial_pos_embds_dim": [32, 32], "feed_forward_size": 96},
    "inkling2_text": {"unpadded_vocab_size": VOCABULARY, "sliding_window_size": 8, "rel_extent": 64},
    "inkling2_loop_text": {"unpadded_vocab_size": VOCABULARY, "sliding_window_size": 8, "rel_extent": 64},
    "roc_bert": {"pronunciation_embed_dim": 32, "shape_embed_dim": 32, "shape_vocab_size": 64},
    "xlm": {"emb_dim": 64},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "hybrid"],
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zaya": {"num_experts_per_tok": 1},
}
"""Fields of single configurations, by model_type, that the rules above do not fit; DEFAULT leaves a field as it is."""


def causal_classes() -> dict[str, str]:
    """Return the class of every model_type that AutoModelForCausalLM of the installed transformers knows."""
    mapping = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items())
    return {kind: name if isinstance(name, str) else name[0] for kind, name in mapping}


def tiny_config(config_class: type[PreTrainedConfig], **overrides: Any) -> PreTrainedConfig:
    """Return a configuration of the class, its sub-configurations too, with the values of `TINY`.

    overrides: fields of the text part.
    """
    with quiet():
        base = config_class()
        kinds = {name: getattr(base, name, None) for name in config_class.sub_configs}
        parts = {name: part for name, part in kinds.items() if isinstance(part, PreTrainedConfig)}
        text = next((name for name, part in parts.items() if part is base.get_text_config(decoder=True)), None)
        fields = {name: tiny_config(type(part)) for name, part in parts.items()} | tiny_fields(base, config_class)
        if text is None:
            fields |= overrides
        else:
            fields[text] = tiny_config(type(parts[text]), **overrides)
        config = config_class(**fields)
    if text is None:
        config.is_decoder = True
    return config


def tiny_fields(base: PreTrainedConfig, config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """Return the fields to set in a configuration whose defaults are those of `base`."""
    defaults = {name: value for name, value in base.to_dict().items() if not isinstance(value, dict)}
    unset = {name for name, value in defaults.items() if value is None} - ALSO_WHEN_NONE
    fields = {k: v for k, v in TINY.items() if k in defaults and k not in unset and v != defaults[k]}
    if "qk_rope_head_dim" in defaults:  # latent attention: as many keys as queries, and head_dim follows
        fields |= {"num_key_value_heads": TINY["num_attention_heads"]}
        fields.pop("head_dim", None)
    for name in ("layer_types", "mlp_layer_types"):  # each kind of layer at least once
        if defaults.get(name):
            kinds = list(dict.fromkeys(defaults[name]))
            fields[name] = [kinds[i % len(kinds)] for i in range(max(len(kinds), TINY["num_hidden_layers"]))]
            fields["num_hidden_layers"] = len(fields[name])
    free = VOCABULARY
    for name, value in defaults.items():  # tokens of images and audio, inside of the small vocabulary
        if name.endswith(("_token_id", "_token_index")) and name not in TINY and isinstance(value, int):
            free -= 1
            fields[name] = free
    fields |= SPECIAL.get(config_class.model_type, {})
    return {name: value for name, value in fields.items() if value is not DEFAULT}


def tiny_model(
    name: str | type[PreTrainedModel], *, attn_implementation: str | dict[str, str] = "eager", **overrides: Any
) -> PreTrainedModel:
    """Return a random model in float32 and eval mode, the same at each call.

    name: a model_type ("llama"), a class or the name of a class. overrides: fields of the text configuration.

    Raises:
        ValueError: The model has more than MAX_PARAMETERS parameters; `SPECIAL` needs an entry.
    """
    cls = getattr(transformers, causal_classes().get(name, name)) if isinstance(name, str) else name
    config = tiny_config(cls.config_class, **overrides)
    with quiet():
        with torch.device("meta"):
            size = sum(p.numel() for p in cls._from_config(config, attn_implementation="eager").parameters())
        if size > MAX_PARAMETERS:
            raise ValueError(f"{cls.__name__} has {size} parameters with the tiny configuration")
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            return cls._from_config(config, attn_implementation=attn_implementation).eval().float()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' log of defaults and missing kernels out of the output."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def packed_rows(*layouts: Sequence[int], vocabulary: int = VOCABULARY) -> dict[str, Tensor]:
    """Return `input_ids` and `position_ids`, int64 [B, S], of random documents; layouts: their lengths, row by row."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(4, vocabulary - 8, (len(layouts), sum(layouts[0])), generator=generator)
    position_ids = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in layouts])
    return {"input_ids": input_ids, "position_ids": position_ids}


def document_ids(*layouts: Sequence[int]) -> Tensor:
    """Return int64 [B, S], the number of each token's document in its row."""
    return torch.stack([torch.arange(len(n)).repeat_interleave(torch.tensor(n)) for n in layouts])
