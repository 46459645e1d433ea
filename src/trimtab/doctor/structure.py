"""Fields besides sizes that individual model types need to make their parts fit together, and variants of some types.

A variant, `type@name`, covers what the type's defaults leave out: other kinds of layers, shared keys and values, ALiBi.
"""

from __future__ import annotations

from typing import Any

DROP = object()
"""In place of a value: leave this field at its default."""

ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
DECODER = {"is_decoder": True}
HYBRID = ["linear_attention", "full_attention"] * 2
WINDOWS = ["sliding_attention", "full_attention"] * 2
ZAMBA = ["linear_attention", "hybrid"] * 2
INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}


def _sections(*sections: int, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {**ROPE, "mrope_section": list(sections), **more}}


STRUCTURE: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "big_bird": {**DECODER, "attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "dots3_note_text": {"num_key_value_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": HYBRID},
    "inkling2_loop_text": {"n_layers_per_attn_res_block": 1, "loop_layer_index_start": 1, "loop_layer_index_end": 3},
    "kimi_linear": {"layer_types": HYBRID},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "mllama": {"vision_config": {"max_num_tiles": 4}},
    "qwen4_exp_text": INDEXER,
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"] * 2,
        "axial_pos_embds": False,
        "num_hidden_layers": 4,
        "hash_seed": 1,
        "num_buckets": 2,
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "feed_forward_size": 48,
    },
    "xlm": {"causal": True},
    "xlstm": {"head_dim": DROP, "num_key_value_heads": DROP},
    "zamba": {
        "layers_block_type": ZAMBA,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
        "n_mamba_heads": 2,
    },
    "zamba2": {"layers_block_type": ZAMBA},
    "zaya": {"num_experts_per_tok": 1},
    # image-text models
    "apertus1p5": {"text_config": {"vocab_size": 400}},
    "chameleon": {"vocabulary_map": {"<image>": 150}},
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}}},
    "cosmos3_edge": {"text_config": _sections(2, 3, 3)},
    "emu3": {"vocabulary_map": {"<image>": 150}},
    "ernie4_5_vl_moe": {"text_config": {**_sections(3, 3, 2), "moe_intermediate_size": [24, 24]}},
    "glm4v_moe": {"text_config": _sections(2, 3, 3, partial_rotary_factor=1.0)},
    "glm5_next": {"text_config": {"qk_rope_head_dim": 0, "qk_head_dim": 8}},
    "hunyuan_vl": {"text_config": _sections(2, 2, 2, 2)},
    "hy_v4_vl": {"text_config": _sections(1, 1, 2)},
    "inkling2": {"vision_config": {"text_hidden_size": 64}},
    "inkling2_loop": {
        "text_config": {"n_layers_per_attn_res_block": 1, "loop_layer_index_start": 1, "loop_layer_index_end": 3},
        "vision_config": {"text_hidden_size": 64},
    },
    "molmo2": {"vision_config": {"image_size": [16, 16]}, "adapter_config": {"vision_feature_layer": [1, 0]}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "paddleocr_vl": {"text_config": _sections(2, 3, 3)},
    "qwen2_5_omni_thinker": {
        "text_config": _sections(2, 3, 3),
        "vision_start_token_id": 140,
        "vision_end_token_id": 141,
    },
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 140, "vision_end_token_id": 141},
    "qwen4_exp": {"text_config": INDEXER},
}
STRUCTURE |= dict.fromkeys(
    (
        "bert",
        "bert-generation",
        "camembert",
        "data2vec-text",
        "electra",
        "ernie",
        "megatron-bert",
        "rembert",
        "roberta",
        "roberta-prelayernorm",
        "roc_bert",
        "roformer",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    ),
    DECODER,
)
STRUCTURE |= {
    name: {"text_config": _sections(2, 3, 3)}
    for name in ("glm46v", "glm4v", "glm_ocr", "glmga", "qwen2_vl", "qwen2_5_vl")
}

VARIANTS: dict[str, dict[str, Any]] = {
    "cohere2@windows": {"layer_types": WINDOWS},
    "deepseek_v3@no_query_rank": {"q_lora_rank": None},
    "exaone4@windows": {"layer_types": WINDOWS},
    "falcon@7b": {"new_decoder_architecture": False, "multi_query": True, "parallel_attn": True},
    "falcon@alibi": {
        "alibi": True,
        "new_decoder_architecture": False,
        "multi_query": True,
        "parallel_attn": False,
    },
    "gemma3_text@windows": {"layer_types": WINDOWS},
    "gemma3n_text@windows": {"layer_types": WINDOWS},
    "gemma3n_text@shared": {"layer_types": WINDOWS, "num_kv_shared_layers": 2},
    "gemma4_text@experts": {
        "layer_types": WINDOWS,
        "enable_moe_block": True,
        "top_k_experts": 2,
        "num_experts": 4,
        "moe_intermediate_size": 24,
    },
    "gemma4_text@global": {
        "layer_types": WINDOWS,
        "global_head_dim": 32,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
    },
    "gemma4_text@shared": {"layer_types": WINDOWS, "num_kv_shared_layers": 2},
    "granite@multipliers": {
        "residual_multiplier": 0.3,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.1,
        "logits_scaling": 2.0,
    },
    "granitemoehybrid@dense": {"layer_types": HYBRID, "num_local_experts": 0},
    "jamba@plain": {"attn_layer_period": 4, "attn_layer_offset": 2},
    "llama4_text@full": {"layer_types": ["full_attention"] * 4},
    "nemotron_h@mixed": {"layers_block_type": ["mamba", "attention", "mlp", "moe"]},
    "olmo3@windows": {"layer_types": WINDOWS},
    "opt@350m": {"word_embed_proj_dim": 32, "do_layer_norm_before": False},
    "phi3@longrope": {
        "original_max_position_embeddings": 64,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 8,
            "long_factor": [2.0] * 8,
            "original_max_position_embeddings": 64,
        },
    },
    "qwen2@windows": {"layer_types": WINDOWS, "use_sliding_window": True},
}
