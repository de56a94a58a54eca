"""Fill-in-the-middle: documents whose pieces are reordered, so that a model learns to complete a gap.

Of the training documents, a share of `data.fim_rate` is cut at two random tokens into prefix, middle and suffix, and
written as

    PSM  <prefix> prefix <suffix> suffix <middle> middle
    SPM  <prefix> <suffix> suffix <middle> prefix middle

The unit is the part of a document that is in one sample, without its closing end-of-document token, which stays in
its place. The three announcing tokens take the room of that part's last three, so lengths and document boundaries stay
as they are; parts of three tokens or fewer are left alone. Cuts are between tokens, so a model that is to complete text
from within a word sees fewer such places than with cuts between characters.

What happens to a document is a function of the seed and of the sample that holds it: the same at every layout and after
every resume, and different in each epoch. Validation data is never permuted, so its loss stays comparable.
"""

import hashlib
from typing import TYPE_CHECKING

from megatron_7b.data._index import FillInTheMiddle
from megatron_7b.errors import ConfigError

if TYPE_CHECKING:
    from megatron_7b.config.schema import DataConfig
    from megatron_7b.tokenizer import Tokenizer


def find_fim_ids(config: "DataConfig", tokenizer: "Tokenizer | None") -> tuple[int, int, int] | None:
    """Return the ids of `config.fim_tokens`, or None if `config.fim_rate` is 0.

    Raises:
        ConfigError: No tokenizer is known, or it has no such token.
    """
    if config.fim_rate == 0:
        return None
    if tokenizer is None:
        raise ConfigError(
            f"data.fim_rate is {config.fim_rate}, but no tokenizer is known that has the tokens {config.fim_tokens}",
            hint="name it as data.tokenizer",
        )
    prefix, middle, suffix = (_find_id(tokenizer, token) for token in config.fim_tokens)
    if len({prefix, middle, suffix}) < 3:
        raise ConfigError(f"data.fim_tokens are {config.fim_tokens}, expected three different tokens")
    return prefix, middle, suffix


def _find_id(tokenizer: "Tokenizer", token: str) -> int:
    ids = tokenizer.encode(token)
    if len(ids) != 1:
        raise ConfigError(
            f"data.fim_tokens names {token!r}, which is not one token of the tokenizer ({tokenizer.path})",
            hint="name tokens that it has, or train one with `megatron-7b tokenizer train --special-tokens …`",
        )
    return ids[0]


def build_fill_in_the_middle(
    config: "DataConfig", fim_ids: tuple[int, int, int] | None, *, eod_id: int | None, seed: int
) -> FillInTheMiddle:
    """Return what the batcher needs to permute documents.

    Raises:
        ConfigError: The ids are missing.
    """
    if fim_ids is None:
        raise ConfigError(f"data.fim_rate is {config.fim_rate}, but the ids of {config.fim_tokens} are not known")
    digest = hashlib.blake2b(f"{seed}/fill in the middle".encode(), digest_size=8).digest()
    prefix, middle, suffix = fim_ids
    return FillInTheMiddle(
        rate=config.fim_rate,
        spm_rate=config.fim_spm_rate,
        prefix_id=prefix,
        middle_id=middle,
        suffix_id=suffix,
        eod_id=eod_id,
        key=int.from_bytes(digest, "little"),
    )
