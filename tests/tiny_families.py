"""Tiny random models of many families, with the toy's tokenizer: what a family does differently, without its weights."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig

TOKENIZER = Path(__file__).resolve().parent.parent / "data" / "tiny_llama3"
TOKENS = {"vocab_size": 3136, "bos_token_id": 0, "eos_token_id": 6, "pad_token_id": 2}
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # losses are compared
LLAMA = TOKENS | SHAPE  # what Llama and most of its descendants call their sizes


def _config(name: str, **values: object) -> Callable[[], PreTrainedConfig]:
    return lambda: getattr(transformers, f"{name}Config")(**values)


def _like_llama(name: str, **more: object) -> Callable[[], PreTrainedConfig]:
    return _config(name, **LLAMA | more)


_GEMMA = {"head_dim": 16, "sliding_window": 1024, "query_pre_attn_scalar": 16}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}


def _gemma3_vision() -> PreTrainedConfig:
    """Gemma 3 as it is published from 4B up: the text model's sizes are in a nested configuration."""
    text = transformers.Gemma3TextConfig(**LLAMA, **_GEMMA)
    vision = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    return transformers.Gemma3Config(
        text_config=text.to_dict(),
        vision_config=vision.to_dict(),
        mm_tokens_per_image=4,
        boi_token_index=3060,
        eoi_token_index=3061,
        image_token_index=3062,
    )


FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": _like_llama("Llama"),
    "qwen2": _like_llama("Qwen2", tie_word_embeddings=True),
    "qwen3": _like_llama("Qwen3", head_dim=16),
    "qwen3_5": _like_llama(
        "Qwen3_5Text",
        head_dim=16,
        layer_types=["linear_attention", "full_attention"],
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
    ),
    "gemma": _like_llama("Gemma", head_dim=16),
    "gemma2": _like_llama("Gemma2", **_GEMMA),
    "gemma3_text": _like_llama("Gemma3Text", **_GEMMA),
    "gemma3_vision": _gemma3_vision,
    "gemma4_text": _like_llama(
        "Gemma4Text",
        head_dim=16,
        global_head_dim=16,
        sliding_window=1024,
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=3136,
        num_kv_shared_layers=0,
    ),
    "mistral": _like_llama("Mistral", sliding_window=None),
    "ministral": _like_llama("Ministral", head_dim=16, sliding_window=1024),
    "phi3": _like_llama("Phi3"),
    "phi": _like_llama("Phi"),
    "granite": _like_llama(
        "Granite",
        logits_scaling=8.0,
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        attention_multiplier=0.0625,
        tie_word_embeddings=True,
    ),
    "granitemoe": _like_llama("GraniteMoe", num_local_experts=4, num_experts_per_tok=2, logits_scaling=8.0),
    "granitemoehybrid": _like_llama(
        "GraniteMoeHybrid",
        layer_types=["mamba", "attention"],
        num_local_experts=0,
        shared_intermediate_size=128,
        mamba_n_heads=8,
        mamba_d_head=16,
        mamba_n_groups=1,
        mamba_d_state=16,
    ),
    "cohere": _like_llama("Cohere", logit_scale=0.0625),
    "cohere2": _like_llama("Cohere2", logit_scale=0.0625, sliding_window=4096),
    "olmo": _like_llama("Olmo"),
    "olmo2": _like_llama("Olmo2"),
    "olmo3": _like_llama("Olmo3", sliding_window=1024),
    "smollm3": _like_llama("SmolLM3", no_rope_layer_interval=2),
    "glm4": _like_llama("Glm4", head_dim=16),
    "exaone4": _like_llama("Exaone4", sliding_window=1024, sliding_window_pattern=2),
    "falcon": _config(
        "Falcon",
        **TOKENS,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        new_decoder_architecture=True,
    ),
    "stablelm": _like_llama("StableLm"),
    "nemotron": _like_llama("Nemotron"),
    "starcoder2": _like_llama("Starcoder2", sliding_window=None),
    "gpt2": _config("GPT2", **TOKENS, n_positions=1024, n_embd=64, n_layer=2, n_head=4, **NO_DROPOUT),
    "opt": _config(
        "OPT",
        **TOKENS,
        hidden_size=64,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=1024,
        word_embed_proj_dim=64,
        dropout=0.0,
    ),
    "bloom": _config("Bloom", **TOKENS, hidden_size=64, n_layer=2, n_head=4),
    "mpt": _config("Mpt", **TOKENS, d_model=64, n_heads=4, n_layers=2, max_seq_len=1024),
    "qwen3_moe": _like_llama("Qwen3Moe", head_dim=16, decoder_sparse_step=1, **_EXPERTS),
    "mixtral": _like_llama("Mixtral", num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "gpt_oss": _like_llama("GptOss", head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=1024),
}


def write_family(name: str, target: Path) -> Path:
    """A folder `target`/`name` with a seeded random model of the family and the toy's tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[name]()).to(torch.float32)
    folder = target / name
    model.save_pretrained(folder)
    for file in ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / file, folder)
    return folder
