"""Hugging Face models of every supported family with random weights, small enough to make in a test."""

import base64
from pathlib import Path
from typing import Any

import torch

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

_SHAPE: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}

_SLIDING = "sliding_attention"

TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_tied": ("llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
    "llama_one_group": ("llama", {"num_key_value_heads": 1}),
    "llama_no_groups": ("llama", {"num_key_value_heads": 6}),
    "llama3_scaled": ("llama", {"rope_parameters": {**LLAMA3_SCALING, "rope_theta": 500.0}}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 12}),
    "qwen2": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2_tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "mistral_window": ("mistral", {"sliding_window": 9}),
    "qwen2_windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 70, "max_window_layers": 1}),
    "qwen3_windows": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 9, "layer_types": [_SLIDING, "full_attention", _SLIDING]},
    ),
}
"""Name of the case, model_type, and what differs from the common shape."""

_OLDER_SHAPE: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
_BERT_SHAPE: dict[str, Any] = {"intermediate_size": 80}

OLDER: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"n_inner": 80, "layer_norm_epsilon": 1e-3}),
    "gpt2_untied": ("gpt2", {"tie_word_embeddings": False, "activation_function": "gelu_pytorch_tanh"}),
    "bert": ("bert", {**_BERT_SHAPE, "layer_norm_eps": 1e-3, "type_vocab_size": 3}),
    "bert_untied": ("bert", {**_BERT_SHAPE, "tie_word_embeddings": False}),
    "bert_pairs": ("bert", _BERT_SHAPE),
    "megatron_bert": ("megatron-bert", _BERT_SHAPE),
    "megatron_bert_pairs": ("megatron-bert", _BERT_SHAPE),
    "megatron_bert_untied": ("megatron-bert", {**_BERT_SHAPE, "tie_word_embeddings": False}),
}
"""The same for models with learned positions; there is no second forward pass of ours for them."""


_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2}
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {**_EXPERTS, "num_local_experts": 4, "sliding_window": 20, "intermediate_size": 67}),
    "qwen3_moe": ("qwen3_moe", {**_EXPERTS, "num_experts": 6, "moe_intermediate_size": 37, "norm_topk_prob": True}),
    "qwen3_moe_shares": ("qwen3_moe", {**_EXPERTS, "num_experts": 4, "moe_intermediate_size": 40, "head_dim": 16}),
}
"""Mixtures of experts, of the common shape; some of experts whose rows are no multiple of 16 bytes."""


def save_tiny_model(case: str, folder: Path, *, vocab_size: int = 199, **others: Any) -> torch.nn.Module:
    """Make a model whose every parameter, norms and biases included, is random; save it and return it in FP32."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForPreTraining

    model_type, changes = {**TINY, **OLDER, **MIXTURES}[case]
    shape = _OLDER_SHAPE if case in OLDER else _SHAPE
    config = AutoConfig.for_model(model_type, **{**shape, **changes, **others, "vocab_size": vocab_size})
    auto = AutoModelForMaskedLM if "bert" in model_type else AutoModelForCausalLM
    auto = AutoModelForPreTraining if case.endswith("_pairs") else auto
    model = auto.from_config(config, dtype=torch.float32, experts_implementation="eager")
    randomize(model)
    model.save_pretrained(folder)
    return model.eval()


def randomize(model: torch.nn.Module) -> None:
    """Give every parameter random values, norms and biases included."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in name.lower() or ".ln" in name
            parameter.copy_(1 + 0.2 * noise if is_norm and name.endswith("weight") else 0.2 * noise)


def save_tiny_t5(folder: Path, *, is_tied: bool = True, **changes: Any) -> torch.nn.Module:
    """Make a T5 with random parameters, of which every size is its own; save it and return it in FP32."""
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {
        "vocab_size": 199, "d_model": 48, "d_kv": 12, "d_ff": 80, "num_layers": 2, "num_heads": 4,
        "relative_attention_num_buckets": 8, "relative_attention_max_distance": 21, "feed_forward_proj": "gated-gelu",
    }  # fmt: skip
    model = T5ForConditionalGeneration(T5Config(**{**sizes, **changes}))
    if not is_tied:  # transformers 5 ties all that it makes, but not all that it loads
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.shared.weight))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "layer_norm" in name else 0.2 * noise)
    model.save_pretrained(folder)
    return model.eval()


def save_tiny_tokenizer(folder: Path, *, vocab_size: int = 300) -> None:
    """Train a byte-level BPE that cuts words where none of the families would, and save it with a chat template."""
    from megatron_7b.tokenizer.train import BpeOptions, save_hugging_face_folder, train_bpe

    options = BpeOptions(vocab_size=vocab_size, special_tokens=("<|end|>", "<|pad|>"), split_digits=True)
    texts = ["the cat sat on the mat, the cat's 12 o'clock 123 nap  "] * 20
    save_hugging_face_folder(train_bpe(iter([texts]), options), options, folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")


def save_foreign_tokenizer(kind: str, folder: Path) -> None:
    """Make a tokenizer that is no tokenizer.json: `bytes`, `tiktoken`, or SentencePiece's `bpe` or `unigram`."""
    from sentencepiece import SentencePieceTrainer

    from megatron_7b.tokenizer import load_tokenizer

    folder.mkdir(parents=True)
    texts = ["the cat sat on the mat, the cat's 12 o'clock 123 nap, naïve café def f(x): return x ** 2"] * 20
    if kind == "bytes":
        load_tokenizer("bytes").save(folder)
    elif kind == "tiktoken":
        words = [bytes([byte]) for byte in range(256)] + [b" t", b"he", b" the", b" c", b" cat", b"12", b"123", b" na"]
        lines = [f"{base64.b64encode(word).decode()} {rank}\n" for rank, word in enumerate(words)]
        (folder / "tokenizer.tiktoken").write_text("".join(lines))
    else:
        SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_prefix=str(folder / "tokenizer"),
            model_type=kind,
            vocab_size=330,
            hard_vocab_limit=False,
            byte_fallback=True,
            minloglevel=2,
            **({"normalization_rule_name": "identity", "remove_extra_whitespaces": False} if kind == "bpe" else {}),
        )
        (folder / "tokenizer.vocab").unlink()
