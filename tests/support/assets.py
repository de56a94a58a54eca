"""Real corpora, tokenizers and weights for tests: a path, or a skip that says why.

Looked for under `$MEGATRON_7B_TEST_ASSETS`, else `.cache/assets` of the checkout. What is missing there is fetched once
by `shared/assets/fetch.py` beside the checkout, where that exists.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
FETCHER = REPOSITORY.parent / "shared" / "assets" / "fetch.py"


def assets_folder() -> Path:
    """Return the folder in which assets are kept between test runs."""
    return Path(os.environ.get("MEGATRON_7B_TEST_ASSETS", REPOSITORY / ".cache" / "assets"))


@functools.cache
def _fetch(name: str) -> str | None:
    """Fetch one asset; return None, or the reason why it could not be had."""
    if not FETCHER.is_file():
        return f"no asset {name!r} under {assets_folder()}, and no {FETCHER} to fetch it with"
    result = subprocess.run(
        [sys.executable, str(FETCHER), str(assets_folder()), name],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
    )
    return None if result.returncode == 0 else f"fetching {name!r} failed: {result.stderr.strip()[-300:]}"


def asset(name: str) -> Path:
    """Return the path of an asset such as `sotu.jsonl` or `gpt2`; skip the calling test where it cannot be had."""
    path = assets_folder() / name
    if not path.exists():
        reason = _fetch(name.removesuffix(".jsonl"))
        if reason is not None or not path.exists():
            pytest.skip(reason or f"{FETCHER} did not write {path}")
    return path
