"""Whether the corpora of a run are what their manifests say, as far as a start can wait for it.

Every file's size is compared, and the manifest's own checksum. Files are hashed whole as long as they share a budget of
bytes, which a start reads in well under a second; of larger ones the hash of evenly spread blocks (`fingerprint`) is
compared, which shows another file of the same size, and most interrupted copies. `full` reads everything, as
`megatron-7b data verify` does.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_7b.data.corpus.fingerprint import CorpusSpots, corpus_spots
from megatron_7b.data.corpus.indexed_dataset import resolve_prefix
from megatron_7b.data.corpus.manifest import FileFacts
from megatron_7b.data.corpus.manifest_reader import find_edit, load_manifest, manifest_path
from megatron_7b.data.corpus.scan import scan_file
from megatron_7b.data.samples.blend import parse_blend
from megatron_7b.data.upkeep.verify import CorpusCheck, Problem, verify_corpora
from megatron_7b.errors import DataFormatError

if TYPE_CHECKING:
    from megatron_7b.config.schema import DataConfig

WHOLE_BYTES = 1 << 29
"""Budget for hashing whole files: each may have as many bytes as there are for each of the files at hand."""
_NUM_THREADS = 8
_SHOWN_PROBLEMS = 10


@dataclass(frozen=True)
class CheckedCorpus:
    """What a start knows of a corpus."""

    prefix: str
    content: str
    """`CorpusSpots.fingerprint`; empty where a file cannot be read."""
    problems: tuple[str, ...]


def find_prefixes(config: "DataConfig") -> list[str]:
    """Return every corpus of a run, once, in full.

    Raises:
        ConfigError: A blend is malformed.
        DataFormatError: A corpus does not exist.
    """
    blends = (("data.train", config.train), ("data.valid", config.valid))
    parts = [part for name, entries in blends if entries for part in parse_blend(entries, name=name)]
    return list(dict.fromkeys(resolve_prefix(part.prefix) for part in parts))


def check_corpora(prefixes: Sequence[str], *, full: bool) -> list[CheckedCorpus]:
    """Compare corpora with their manifests; one without a manifest has nothing to be compared with.

    Args:
        prefixes: As `resolve_prefix` returns them.
        full: Read every byte.

    Returns:
        One result per corpus, in their order.
    """
    whole_bytes = WHOLE_BYTES // max(1, 2 * len(prefixes))
    found = _full_problems(prefixes) if full else [()] * len(prefixes)
    with ThreadPoolExecutor(_NUM_THREADS, "check-corpora") as pool:
        quick = pool.map(lambda prefix: _check(prefix, 0 if full else whole_bytes), prefixes)
        return [
            CheckedCorpus(one.prefix, one.content, of_all or one.problems)
            for one, of_all in zip(quick, found, strict=True)
        ]


def refuse_damaged(checked: Sequence[CheckedCorpus]) -> None:
    """Name everything that is wrong.

    Raises:
        DataFormatError: A corpus is not what its manifest says.
    """
    problems = [problem for one in checked for problem in one.problems]
    if not problems:
        return
    damaged = [one.prefix for one in checked if one.problems]
    more = f"\n  … and {len(problems) - _SHOWN_PROBLEMS} more" if len(problems) > _SHOWN_PROBLEMS else ""
    raise DataFormatError(
        "corpora are not what their manifests say:\n"
        + "\n".join(f"  {problem}" for problem in problems[:_SHOWN_PROBLEMS])
        + more,
        hint=f"`megatron-7b data verify {damaged[0]}` reads everything; copy or write the corpus again, or, if it is "
        "right, let `megatron-7b data adopt PREFIX --tokenizer DIR --overwrite` write a new manifest",
    )


def _full_problems(prefixes: Sequence[str]) -> list[tuple[str, ...]]:
    reports = verify_corpora(
        [CorpusCheck(prefix) for prefix in prefixes], num_threads=_NUM_THREADS, advance=lambda _: None
    )
    return [tuple(map(str, report.problems)) for report in reports]


def _check(prefix: str, whole_bytes: int) -> CheckedCorpus:
    try:
        spots = corpus_spots(prefix)
        problems = tuple(map(str, _problems(prefix, spots, whole_bytes)))
    except OSError as error:
        problem = Problem(str(error.filename), "reading", "a readable file", error.strerror or str(error))
        return CheckedCorpus(prefix, "", (str(problem),))
    except DataFormatError as error:
        return CheckedCorpus(prefix, "", (str(error.args[0]),))
    return CheckedCorpus(prefix, spots.fingerprint, problems)


def _problems(prefix: str, spots: CorpusSpots, whole_bytes: int) -> Iterator[Problem]:
    manifest = load_manifest(prefix)
    if manifest is None:
        return
    if edit := find_edit(prefix):
        yield Problem(str(manifest_path(prefix)), "checksum of its own content", *edit)
    for suffix, facts, found in ((".bin", manifest.bin, spots.bin), (".idx", manifest.idx, spots.idx)):
        yield from _file_problems(Path(prefix + suffix), facts, found, whole_bytes)
    for suffix, facts in manifest.beside.items():
        yield from _file_problems(Path(prefix + suffix), facts, spots.beside.get(suffix, ""), whole_bytes)


def _file_problems(file: Path, expected: FileFacts, spots: str, whole_bytes: int) -> Iterator[Problem]:
    size = file.stat().st_size
    if size != expected.size:
        yield Problem(str(file), "size in bytes", str(expected.size), str(size))
    elif size <= whole_bytes:
        found = scan_file(file, lambda _: None).xxh3_128
        if found != expected.xxh3_128:
            yield Problem(str(file), "xxh3_128", expected.xxh3_128, found)
    elif expected.spots not in (None, spots):
        yield Problem(str(file), "hash of evenly spread blocks", str(expected.spots), spots)
