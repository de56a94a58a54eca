"""Texts of many kinds as JSONL, and tokenizers of three kinds, for comparing encoders; kept between test runs."""

import functools
import html
import json
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.support.assets import asset, assets_folder

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHINESE_PACKAGE = "libreoffice-help-zh-cn"


def chinese_texts() -> list[str]:
    """Pages of Debian's Chinese help for LibreOffice, without their tags; a skip where the package cannot be had."""
    return [json.loads(line)["text"] for line in _chinese_file().read_bytes().splitlines()]


@functools.cache
def _chinese_file() -> Path:
    file = assets_folder() / "libreoffice_zh.jsonl"
    if file.exists():
        return file
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        pytest.skip(f"no {file}, and no apt-get to fetch {CHINESE_PACKAGE} with")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        got = subprocess.run(["apt-get", "download", CHINESE_PACKAGE], cwd=folder, capture_output=True, text=True)
        packages = list(folder.glob("*.deb"))
        if got.returncode or not packages:
            pytest.skip(f"apt-get download {CHINESE_PACKAGE} failed: {got.stderr.strip()[-200:]}")
        subprocess.run(["dpkg-deb", "-x", str(packages[0]), str(folder / "unpacked")], check=True)
        texts = [_strip_tags(page.read_text(encoding="utf-8")) for page in sorted(folder.rglob("*.html"))]
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_bytes(b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts if text))
    temporary.replace(file)
    return file


def _strip_tags(page: str) -> str:
    page = re.sub(r"(?s)<(script|style|head)\b.*?</\1>", " ", page)
    return re.sub(r"[ \t]*\n\s*", "\n", html.unescape(re.sub(r"<[^>]*>", "\n", page))).strip()


def python_texts() -> list[str]:
    """The standard library's sources."""
    files = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    return [file.read_text("utf-8", "replace") for file in files if "site-packages" not in file.parts]


def english_texts(name: str) -> list[str]:
    """`sotu` or `shakespeare`."""
    return [json.loads(line)["text"] for line in asset(f"{name}.jsonl").read_bytes().splitlines()]


def adversarial_lines(word_bytes: int, step: int) -> Iterator[bytes]:
    """JSON lines on which parsers and encoders are known to part.

    Args:
        word_bytes: Length of the longest word.
        step: Every so many of the code points beyond the first plane.
    """
    planes = [*range(0xD800), *range(0xE000, 0x10000), *range(0x10000, 0x110000, step)]
    texts = ["", "\x00", "a\x00b\x00\x00", " ", "\r\n\r\n\t \u00a0\u3000\u2028", " " * 5000, "\n" * 3000, ""]
    texts += ["".join(map(chr, planes[at : at + 997])) for at in range(0, len(planes), 997)]
    texts += [" ".join(map(chr, planes[at : at + 499 * 7 : 7])) for at in range(0, len(planes), 499 * 7)]
    texts += [
        "<|endoftext|>",
        "x <|endoftext|>y<|endoftext|",
        "<s></s><unk>",
        "\u0130\u0131\u017f\u1e9e",
        "e\u0301" * 500,
    ]
    texts += [
        "\U0001f468\u200d\U0001f469\u200d\U0001f467" * 100,
        "1234567890" * 100,
        "'S 'LL 'Re don\u2019t",
        "\ufeff\ufffe",
    ]
    texts += ["a" * word_bytes, "\u00e9" * (word_bytes // 20), "ab" * (word_bytes // 20), "=" * (word_bytes // 20)]
    for text in texts:
        yield json.dumps({"text": text}).encode()
        yield json.dumps({"text": text}, ensure_ascii=False).encode()
    yield rb'{"text": "lone \ud800 surrogate"}'
    yield rb'{"text": "lone \udc00"}'
    yield rb'{"text": "wrong order \udc00\ud800"}'
    yield rb'{"note": "\ud800", "text": "lone, but in a key that is not read"}'
    yield b'{"text": "raw \x01 control"}'
    yield b'{"text": "invalid \xff utf-8"}'
    yield b'{"text": "encoded surrogate \xed\xa0\x80"}'


def train_llama3_style(folder: Path, texts: Sequence[str]) -> Path:
    """A byte-level BPE behind Llama 3's pattern."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated", invert=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=16_000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}')
    return folder


def train_sentencepiece(folder: Path, texts: Sequence[str]) -> Path:
    """A SentencePiece BPE with byte fallback, as Llama 2 has one."""
    import sentencepiece

    folder.mkdir()
    lines = [line for text in texts for line in text.splitlines() if 0 < len(line) < 2000]
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "model"),
        vocab_size=8000,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.9995,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        num_threads=1,
    )
    return folder / "model.model"
