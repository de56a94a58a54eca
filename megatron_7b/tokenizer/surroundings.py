"""The tokens that transformers puts around a text."""

from megatron_7b.tokenizer.base import Tokenizer
from megatron_7b.tokenizer.hugging_face import HuggingFaceTokenizer
from megatron_7b.tokenizer.settings import read_tokenizer_settings


def surrounding_ids(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the tokens that transformers puts before a text and after it: often a bos token before it, or none."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        plain, whole = (tokenizer.backend.encode("a", add_special_tokens=special).ids for special in (False, True))
        starts = (start for start in range(len(whole)) if whole[start : start + len(plain)] == plain)
        start = next(starts, None)
        return ((), ()) if start is None else (tuple(whole[:start]), tuple(whole[start + len(plain) :]))
    settings = read_tokenizer_settings(tokenizer) if tokenizer.kind == "sentencepiece" else {}
    before = (tokenizer.bos_id,) if settings.get("add_bos_token") is True and tokenizer.bos_id is not None else ()
    after = (tokenizer.eod_id,) if settings.get("add_eos_token") is True and tokenizer.eod_id is not None else ()
    return before, after
