"""Which tensor of a file is stored in what."""

import gguf

TYPES = gguf.GGMLQuantizationType
_BLOCK = {TYPES.Q4_K: 256, TYPES.Q6_K: 256, TYPES.Q8_0: 32, TYPES.Q4_0: 32, TYPES.Q5_0: 32}
_INSTEAD = {
    TYPES.Q4_K: TYPES.Q5_0,
    TYPES.Q6_K: TYPES.Q8_0,
    TYPES.Q8_0: TYPES.F16,
    TYPES.Q4_0: TYPES.F16,
    TYPES.Q5_0: TYPES.F16,
}
"""What takes the place of a type whose blocks do not divide the rows; as llama.cpp has it."""

FILE_TYPES = {
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
    "q4_k_m": gguf.LlamaFileType.MOSTLY_Q4_K_M,
    "q6_k": gguf.LlamaFileType.MOSTLY_Q6_K,
}
_USUAL = {
    "f16": TYPES.F16, "bf16": TYPES.BF16, "q8_0": TYPES.Q8_0, "q4_0": TYPES.Q4_0, "q4_k_m": TYPES.Q4_K,
    "q6_k": TYPES.Q6_K,
}  # fmt: skip


def type_of(
    name: str, shape: tuple[int, ...], kind: str, *, num_layers: int, is_tied: bool
) -> gguf.GGMLQuantizationType:
    """Return what a tensor is stored in.

    In the types of few bits, the output layer has six, and so have half of the matrices of values and of `down` in
    q4_k_m: those of the first and last eighth of the layers, and of every third one between. Vectors and learned
    positions stay in FP32.

    **Source:** `llama_tensor_get_type` of llama.cpp, for these types.

    Args:
        name: llama.cpp's, such as blk.0.attn_v.weight.
        shape: [rows, width], or [width].
        kind: Of the file.
        num_layers: Layers of the model.
        is_tied: Whether the word embedding is the output layer, too.
    """
    if len(shape) < 2 or name.startswith("position_embd"):
        return TYPES.F32
    chosen = _USUAL[kind]
    is_output = name == "output.weight" or (is_tied and name == "token_embd.weight")
    if kind in ("q4_0", "q4_k_m") and is_output:
        chosen = TYPES.Q6_K
    elif kind == "q4_k_m" and name.endswith(("attn_v.weight", "ffn_down.weight")):
        chosen = TYPES.Q6_K if _has_more_bits(int(name.split(".")[1]), num_layers) else chosen
    while chosen in _BLOCK and shape[-1] % _BLOCK[chosen]:
        chosen = _INSTEAD[chosen]
    return chosen


def _has_more_bits(layer: int, num_layers: int) -> bool:
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2
