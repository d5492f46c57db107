"""Two dozen architectures at tiny sizes: configuration, model, and what is no hidden matrix."""

from __future__ import annotations

from typing import Any

_COMMON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 100}
_WIDE = {**_COMMON, "intermediate_size": 64}
_LLAMA = {**_WIDE, "num_key_value_heads": 1}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 100}
_SIDES = {
    **{f"{side}_ffn_dim": 64 for side in ("encoder", "decoder")},
    **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 2 for side in ("encoder", "decoder")},
    **{"d_model": 32, "vocab_size": 100, "pad_token_id": 0},
}
_MODERN = {name: 0 for name in ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id")}
_LATENT = {
    **{"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2},
    **{"moe_intermediate_size": 16, "first_k_dense_replace": 1, "q_lora_rank": 16},
    **{"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
}
_BERT_HEAD = ("cls.predictions.transform.dense",)
_PLAIN_HEAD = ("lm_head",)
_PATCHES = ("patch_embedding", "class_embedding", "cls_token", "position_embeddings")

#: (name before "Config", suffix of the model's class, options, parts of names left out)
ARCHITECTURES: tuple[tuple[str, str, dict[str, Any], tuple[str, ...]], ...] = (
    ("Llama", "ForCausalLM", _LLAMA, _PLAIN_HEAD),
    ("Mistral", "ForCausalLM", _LLAMA, _PLAIN_HEAD),
    ("Qwen3", "ForCausalLM", {**_LLAMA, "head_dim": 16}, _PLAIN_HEAD),
    ("Gemma2", "ForCausalLM", {**_LLAMA, "head_dim": 16}, ()),
    ("Phi3", "ForCausalLM", {**_LLAMA, "pad_token_id": 0}, _PLAIN_HEAD),
    ("Mixtral", "ForCausalLM", {**_LLAMA, "num_local_experts": 4}, ("mlp.gate.", "lm_head")),
    (
        "Qwen2Moe",
        "ForCausalLM",
        {
            **_LLAMA,
            **{"num_experts": 4, "moe_intermediate_size": 16},
            "shared_expert_intermediate_size": 32,
        },
        ("mlp.gate.", "shared_expert_gate", "lm_head"),
    ),
    ("DeepseekV3", "ForCausalLM", {**_LLAMA, **_LATENT}, ("mlp.gate.", "lm_head")),
    (
        "GptOss",
        "ForCausalLM",
        {**_LLAMA, "num_local_experts": 4, "head_dim": 16},
        ("mlp.router.", "_proj_bias", "lm_head"),
    ),
    ("GPT2", "LMHeadModel", _GPT, ()),
    ("GPTNeoX", "ForCausalLM", _WIDE, _PLAIN_HEAD),
    ("GPTJ", "ForCausalLM", {**_GPT, "rotary_dim": 8}, _PLAIN_HEAD),
    ("OPT", "ForCausalLM", {**_COMMON, "ffn_dim": 64, "word_embed_proj_dim": 32}, ()),
    ("Bloom", "ForCausalLM", {**_GPT, "hidden_size": 32}, ()),
    ("Falcon", "ForCausalLM", _COMMON, ()),
    ("Bert", "ForMaskedLM", _WIDE, _BERT_HEAD),
    ("Roberta", "ForMaskedLM", _WIDE, ("lm_head.dense",)),
    (
        "DistilBert",
        "ForMaskedLM",
        {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2, "vocab_size": 100},
        ("vocab_transform",),
    ),
    ("ModernBert", "ForMaskedLM", {**_WIDE, **_MODERN, "sep_token_id": 0}, ("head.dense",)),
    ("DebertaV2", "ForMaskedLM", _WIDE, _BERT_HEAD),
    (
        "T5",
        "ForConditionalGeneration",
        {"d_model": 32, "d_ff": 64, "d_kv": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 100},
        (),
    ),
    ("Bart", "ForConditionalGeneration", _SIDES, ()),
    ("Whisper", "ForConditionalGeneration", _SIDES, ("encoder.conv",)),
    ("ViT", "ForImageClassification", {**_WIDE, "image_size": 32}, (*_PATCHES, "classifier")),
    (
        "Swin",
        "ForImageClassification",
        {
            **{"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2]},
            **{"image_size": 32, "window_size": 4},
        },
        (*_PATCHES, "relative_position_bias_table", "classifier"),
    ),
    (
        "Mamba",
        "ForCausalLM",
        {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 100, "state_size": 8},
        ("A_log", "conv1d"),
    ),
    (
        "Jamba",
        "ForCausalLM",
        {
            **_LLAMA,
            **{"num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
            **{"expert_layer_period": 2, "expert_layer_offset": 1},
        },
        ("A_log", "conv1d", "feed_forward.router", "lm_head"),
    ),
)
