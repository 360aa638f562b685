"""Which networks of transformers there are, and their small configurations: two layers, widths of 32.

A configuration is the library's own with every size in ``SMALL`` put in, and with ``SPECIAL`` where sizes depend on
each other. The head of a network is that of the task it is listed under.
"""

from __future__ import annotations

from typing import Any

VOCABULARY = 99

# fmt: off
TASKS = {
    "causal": """
        afmoe apertus arcee bamba bert-generation biogpt bitnet bloom codegen cohere cohere2 ctrl deepseek_v2
        deepseek_v3 diffllama doge ernie4_5_moe exaone4 falcon falcon_h1 falcon_mamba gemma gemma2 gemma3_text
        gemma3n_text glm4 glm4_moe gpt2 gpt_bigcode gpt_neo gpt_neox gpt_oss gptj granite granitemoehybrid helium jamba
        jetmoe kimi_linear lfm2 lfm2_moe llama llama4_text mamba mamba2 minimax mistral mixtral modernbert-decoder mpt
        nemotron nemotron_h olmo2 olmo_hybrid olmoe openai-gpt opt persimmon phi phi3 phimoe qwen2 qwen2_moe
        qwen3 qwen3_5_text qwen3_moe qwen3_next recurrent_gemma reformer rwkv smollm3 stablelm starcoder2 xglm xlnet
        zamba2""",
    "masked": """
        albert bert big_bird camembert convbert data2vec-text deberta deberta-v2 distilbert electra esm eurobert fnet
        funnel ibert layoutlm longformer megatron-bert mobilebert modernbert mpnet nomic_bert nystromformer perceiver
        rembert roberta roformer squeezebert tapas xlm xmod yoso""",
    "seq2seq": """
        bart bigbird_pegasus blenderbot fsmt led longt5 m2m_100 marian mbart mt5 mvp nllb-moe pegasus pegasus_x
        prophetnet switch_transformers t5 t5gemma umt5""",
    "image": """
        beit bit convnext convnextv2 cvt data2vec-vision deit dinov2 dinov2_with_registers efficientnet focalnet
        hgnet_v2 hiera ijepa levit mobilenet_v1 mobilenet_v2 mobilevit mobilevitv2 poolformer pvt pvt_v2 regnet resnet
        segformer siglip swiftformer swin swinv2 textnet vit vit_msn""",
    "dense": "depth_anything dpt glpn",
    "boxes": "detr yolos",
    "sound": "data2vec-audio hubert sew sew-d unispeech unispeech-sat wav2vec2 wavlm",
    "spectrum": "audio-spectrogram-transformer moonshine speech_to_text wav2vec2-bert whisper",
    "both": "altclip chinese_clip clip clipseg groupvit owlvit vilt blip",
    "prompt": """
        aya_vision gemma3 got_ocr2 internvl llava paligemma vipllava""",
}
# fmt: on
AUTO = {
    "causal": ["CausalLM"],
    "masked": ["MaskedLM"],
    "seq2seq": ["Seq2SeqLM"],
    "image": ["ImageClassification"],
    "dense": ["DepthEstimation", "SemanticSegmentation"],
    "boxes": ["ObjectDetection"],
    "sound": ["CTC"],
    "spectrum": ["AudioClassification", "SpeechSeq2Seq", "CTC"],
    "both": [""],
    "prompt": ["ImageTextToText"],
}
SMALL: dict[str, Any] = {
    **dict.fromkeys("hidden_size d_model n_embd dim embedding_size projection_dim".split(), 32),
    **dict.fromkeys("intermediate_size encoder_ffn_dim decoder_ffn_dim d_ff hidden_dim ffn_dim".split(), 64),
    **dict.fromkeys("num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers".split(), 2),
    **dict.fromkeys("num_decoder_layers num_key_value_heads num_experts_per_tok".split(), 2),
    **dict.fromkeys("num_attention_heads n_head n_heads num_heads encoder_attention_heads".split(), 4),
    **dict.fromkeys("decoder_attention_heads num_experts num_local_experts n_routed_experts".split(), 4),
    **dict.fromkeys("head_dim d_kv patch_size".split(), 8),
    **dict.fromkeys("moe_intermediate_size shared_expert_intermediate_size image_size".split(), 32),
    **dict.fromkeys("max_position_embeddings n_positions".split(), 64),
    **dict.fromkeys("chunk_size mamba_chunk_size".split(), 8),
    **dict.fromkeys("mamba_d_state state_size".split(), 16),
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    **dict.fromkeys("bos_token_id eos_token_id decoder_start_token_id".split(), 1),
}
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1]},
    "codegen gptj": {"rotary_dim": 4},
    "deepseek_v2 deepseek_v3": {
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
        "num_key_value_heads": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
        "n_routed_experts": 4, "moe_intermediate_size": 32,
    },
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8},
    "gemma3n_text": {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8,
        "activation_sparsity_pattern": [0.0, 0.0, 0.0, 0.0],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": ["mamba", "attention"]},
    "kimi_linear": {
        "num_experts_per_token": 2, "num_expert_group": 1, "topk_group": 1, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "mpt": {"use_cache": True},
    "detr": {
        "backbone_config": {
            "model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1],
            "out_features": ["stage2"],
        },
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "nemotron": {"num_key_value_heads": 2},
    "qwen3_next qwen3_5_text": {
        "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32, "use_cache": True},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "lsh"], "num_buckets": 4},
    "zamba2": {"layer_types": ["mamba", "hybrid"], "hybrid_layer_ids": [1], "n_mamba_heads": 8},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 0, "mask_token_id": 4},
    "perceiver": {"d_latents": 32, "num_latents": 8, "num_cross_attention_heads": 4, "num_self_attends_per_block": 2},
    "bert-generation": {"is_decoder": True},
    "xlm": {"emb_dim": 32, "vocab_size": VOCABULARY, "n_words": VOCABULARY},
    "xmod": {"default_language": "en_XX"},
    "bit resnet regnet": {
        "embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "num_groups": 4, "groups_width": 8,
        "out_features": None,
    },
    "convnext convnextv2": {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "patch_size": 4},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 320},
    "focalnet": {
        "embed_dim": 16, "depths": [1, 1], "hidden_sizes": [16, 32], "focal_levels": [1, 1], "focal_windows": [3, 3],
        "patch_size": 4,
    },
    "hiera": {
        "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8], "image_size": [64, 64],
        "patch_size": [7, 7],
    },
    "levit": {
        "hidden_sizes": [16, 32, 48], "num_attention_heads": [1, 2, 3], "depths": [1, 1, 1], "key_dim": [8, 8, 8],
        "image_size": 64, "patch_size": 16,
    },
    "mobilevit mobilevitv2": {"image_size": 64, "patch_size": 2},
    "swin swinv2": {
        "image_size": 64, "patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4],
    },
    "dpt": {
        "num_hidden_layers": 4, "neck_hidden_sizes": [16, 16, 16, 16], "backbone_out_indices": [0, 1, 2, 3],
        "fusion_hidden_size": 16, "is_hybrid": False,
    },
    "depth_anything": {
        "backbone_config": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "reshape_hidden_states": False},
        "neck_hidden_sizes": [16, 16, 16, 16], "fusion_hidden_size": 16, "reassemble_hidden_size": 32,
    },
    "audio-spectrogram-transformer": {"max_length": 64, "num_mel_bins": 16},
    "speech_to_text": {"max_source_positions": 128, "max_target_positions": 64},
    "wav2vec2-bert": {"feature_projection_input_dim": 16, "vocab_size": VOCABULARY},
    "whisper": {"max_source_positions": 32, "max_target_positions": 64, "num_mel_bins": 16},
    "aya_vision got_ocr2 llava paligemma": {"image_token_index": 5},
    "internvl": {"image_token_id": 5, "vision_config": {"image_size": [32, 32], "patch_size": [8, 8]}},
    "vipllava": {"image_token_index": 5, "vision_feature_layers": [-1, -2]},
    "gemma3": {"image_token_index": 5, "mm_tokens_per_image": 16},
}  # fmt: skip


def names() -> list[str]:
    """Every network listed here."""
    return [f"transformers:{name}" for listed in TASKS.values() for name in listed.split()]


def configuration(kind: type[Any], name: str) -> Any:
    """The small configuration of the network of this name."""
    return small(kind, **next((special for listed, special in SPECIAL.items() if name in listed.split()), {}))


def small(kind: type[Any], **special: Any) -> Any:
    """A configuration of this class with small sizes, in its parts too; ``special`` goes before them."""
    default = kind()
    sizes = {
        key: SMALL[key]
        for key, value in default.to_dict().items()
        if key in SMALL and type(value) is int and key not in special
    }
    for key in kind.sub_configs:
        part, inner = getattr(default, key, None), special.get(key, {})
        if part is not None and "model_type" not in inner:
            special.pop(key, None)
            sizes[key] = small(type(part), **inner).to_dict()
    return kind(**sizes, **special)
