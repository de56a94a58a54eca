"""Reading: every record is a document, a quarantined record or an error; none is skipped."""

import gzip
import json
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_7b.errors import ConfigError, DataFormatError, PathError
from megatron_7b.prepare.document import Document
from megatron_7b.prepare.document_sections import (
    ExtractionSection,
    LanguageSection,
    NormalizationSection,
    ReadingSection,
)
from megatron_7b.prepare.extras import import_zstd
from megatron_7b.prepare.reading.extraction import Extraction, decode_html
from megatron_7b.prepare.reading.inputs import check_per_source, find_inputs, plan_shards
from megatron_7b.prepare.reading.records import Dropped, Unreadable, read_piece
from megatron_7b.prepare.recipe import Recipe, RecipeBook, load_recipe
from megatron_7b.prepare.rules.language import LanguageFilter, check_language
from megatron_7b.prepare.rules.normalization import Normalization
from megatron_7b.prepare.running.heartbeat import Heartbeat
from megatron_7b.prepare.running.unpack_task import UNPACKED, plan_unpacking
from tests.prepare.web_archives import PROSE, Page, article, compress, compress_with_dictionary, record


def read_shards(
    path: Path, megabytes: float = 64.0, section: ReadingSection | None = None
) -> list[list[Document | Unreadable | Dropped]]:
    """The records of a file, shard by shard."""
    wanted = replace(section or ReadingSection(), shard_megabytes=megabytes)
    files, book = find_inputs([str(path)]).files, RecipeBook(Recipe(reading=wanted))
    unpacking = plan_unpacking(files, book, path.parent / "work")
    for task in unpacking:
        task.run(Heartbeat())
    shards = plan_shards(files, book, {task.file.path: task.pieces() for task in unpacking})
    folder = path.parent / "work" / UNPACKED
    return [[one for piece in shard.pieces for one in read_piece(piece, wanted, folder)] for shard in shards]


def read_all(path: Path, section: ReadingSection | None = None) -> list[Document | Unreadable | Dropped]:
    return [record for shard in read_shards(path, section=section) for record in shard]


def lines(count: int) -> list[bytes]:
    return [json.dumps({"text": f"document {number}", "id": number}).encode() for number in range(1, count + 1)]


def test_a_bad_byte_in_the_middle_loses_only_its_record(tmp_path: Path) -> None:
    """datatrove's reader drops the rest of the file, and exits with 0."""
    rows = lines(1001)
    rows[500] = b'{"text": "M\xfcller"}'
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(rows) + b"\n")
    found = read_all(path)
    assert len(found) == 1001
    bad = [one for one in found if isinstance(one, Unreadable)]
    assert [(one.position, one.head) for one in bad] == [(501, '{"text": "M\\xfcller"}')]
    assert "invalid UTF-8" in bad[0].reason
    last = found[-1]
    assert isinstance(last, Document)
    assert (last.text, last.position, last.fields) == ("document 1001", 1001, {"id": 1001})


def test_a_wrong_key_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines(3)))
    with pytest.raises(DataFormatError, match=r"3 of 3 records cannot be read.*key 'content' is missing"):
        read_all(path, ReadingSection(text_key="content"))


def test_too_many_bad_records_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([*lines(400), *[b"{"] * 12]))
    with pytest.raises(DataFormatError, match=r"12 of 412 records.*line or record 401: not JSON"):
        read_all(path)
    assert len(read_all(path, ReadingSection(max_bad_fraction=0.05))) == 412


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_truncated_compressed_file_is_an_error(tmp_path: Path, suffix: str) -> None:
    from megatron_7b.prepare.running.workspace import write_lines

    path = tmp_path / f"a.jsonl{suffix}"
    if suffix == ".gz":
        path.write_bytes(gzip.compress(b"\n".join(lines(5000))))
    else:
        write_lines(path, [json.loads(line) for line in lines(5000)], "zstd")
    assert len(read_all(path)) == 5000
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataFormatError, match=path.name):
        read_all(path)


def test_odd_but_valid_json_is_a_document(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "score": NaN}\n\n{"text": "b", "id": 123456789012345678901234567890}\n')
    assert [(one.text, one.position) for one in read_all(path) if isinstance(one, Document)] == [("a", 1), ("b", 3)]


@pytest.mark.parametrize(
    "name",
    ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "lines.txt.gz", "a.warc", "a.warc.gz", "one_member.warc.gz", "a.warc.zst"],
)
def test_pieces_of_a_file_are_the_file(tmp_path: Path, name: str) -> None:
    """Whatever the format, one large file keeps all workers busy."""
    random_ = random.Random(1)
    texts = [f"text {number} " + random_.randbytes(number * 37 % 500).hex() for number in range(1, 501)]
    path = tmp_path / name
    records = [record(Page(f"http://e.org/{number}", article(number, text))) for number, text in enumerate(texts)]
    # A record in the body of another one, as in a page about archives, is none.
    records[100] = record(Page("http://e.org/", b"\r\n\r\n".join(records[:50]), content_type="text/plain"))
    rows = [json.dumps({"text": text, "id": number}).encode() + b"\n" for number, text in enumerate(texts)]
    section = ReadingSection(text_documents="line")
    lines_ = [text.encode() + b"\n" for text in texts]
    write: dict[str, Callable[[], bytes]] = {
        "a.jsonl": lambda: b"".join(rows),
        "a.jsonl.gz": lambda: gzip.compress(b"".join(rows)),
        "a.jsonl.zst": lambda: bytes(import_zstd().compress(b"".join(rows))),
        "lines.txt.gz": lambda: gzip.compress(b"".join(lines_)),
        "a.warc": lambda: b"".join(records),
        "a.warc.gz": lambda: compress(records),
        "one_member.warc.gz": lambda: gzip.compress(b"".join(records)),
        "a.warc.zst": lambda: compress_with_dictionary(records),
    }
    path.write_bytes(write[name]())
    shards = read_shards(path, 0.03, section)
    assert len(shards) >= 4
    assert all(shards)
    whole = read_all(path, section)
    assert [one for shard in shards for one in shard] == whole
    assert all(isinstance(one, Document) for one in whole)
    assert len({one.position for one in whole if isinstance(one, Document)}) == len(whole) == 500


@pytest.mark.parametrize("cut", [1, 40, 4000])
def test_a_truncated_archive_in_zstandard_is_an_error(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "a.warc.zst"
    records = [record(Page(f"http://e.org/{number}", article(number))) for number in range(50)]
    path.write_bytes(compress_with_dictionary(records)[:-cut])
    with pytest.raises(DataFormatError, match="a.warc.zst cannot be read: .*ended before"):
        read_all(path)


def test_parquet_by_row_groups_with_all_columns(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    texts: list[str | None] = [f"row {number} " + "x" * 40_000 for number in range(100)]
    texts[41] = None
    pq.write_table(pa.table({"text": texts, "id": list(range(100))}), path, row_group_size=10, compression="none")
    shards = plan_shards(find_inputs([str(path)]).files, load_recipe([], {"reading.shard_megabytes": 0.1}))
    assert len(shards) > 2
    found = [one for shard in shards for piece in shard.pieces for one in read_piece(piece, ReadingSection())]
    assert [one.position for one in found if not isinstance(one, Dropped)] == list(range(1, 101))
    assert isinstance(found[41], Unreadable)
    assert isinstance(found[99], Document)
    assert found[99].fields == {"id": 99}
    pq.write_table(pq.read_table(path), path, row_group_size=100, compression="none")
    cut = read_shards(path, 0.1)
    assert len(cut) > 2
    assert [record for shard in cut for record in shard] == found
    with pytest.raises(DataFormatError, match="no column body; its columns: text, id"):
        read_all(path, ReadingSection(text_key="body"))
    pq.write_table(pa.table({"text": ["Müller".encode(), b"M\xfcller"]}), path)
    assert [type(one) for one in read_all(path)] == [Document, Unreadable]


def test_pages_of_an_archive_that_are_no_documents_are_accounted_for(tmp_path: Path) -> None:
    pages = [
        Page("http://example.org/1", article(1)),
        Page("http://example.org/2", b"gone", status="404 Not Found"),
        Page("http://example.org/3", b"\x89PNG", content_type="image/png"),
        Page("http://example.org/4", PROSE.encode(), content_type="text/plain"),
    ]
    path = tmp_path / "a.warc.gz"
    path.write_bytes(compress([record(page) for page in pages]))
    found = read_all(path)
    assert [type(one) for one in found] == [Document, Dropped, Dropped, Document]
    assert [one.removed.reason for one in found if isinstance(one, Dropped)] == [
        "reading:http_status",
        "reading:content_type",
    ]
    first = found[0]
    assert isinstance(first, Document)
    assert first.is_html
    assert first.fields["url"] == "http://example.org/1"


def test_inputs_say_all_that_is_wrong_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    (tmp_path / "b.jsonl").write_bytes(b"{}")
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(PathError) as caught:
        find_inputs(
            [
                str(tmp_path / "pipe.jsonl"),
                str(tmp_path / "a.pdf"),
                str(tmp_path / "b.jsonl"),
                str(tmp_path / "*.jsonl"),
                "nowhere",
                "*.x",
            ]
        )
    for part in (
        "a.pdf cannot be read: its ending",
        "pipe.jsonl cannot be read: it is no regular file",
        "b.jsonl is named twice",
        "nowhere does not exist",
        "*.x matches no",
    ):
        assert part in str(caught.value)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "c.JSONL.GZ").write_bytes(gzip.compress(b"{}"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "folder" / ".hidden.jsonl").write_bytes(b"{}")
    (linked,) = find_inputs([str(tmp_path / "folder")]).files
    assert (linked.path, linked.format, linked.compression) == (
        str(tmp_path / "folder" / "link" / "c.JSONL.GZ"),
        "jsonl",
        ".gz",
    )
    assert find_inputs([str(tmp_path)]).left_out == {".pdf": 1}


def test_a_pattern_of_per_source_that_matches_nothing_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_bytes(b"{}")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("per_source:\n  - files: 'code/*'\n    quality: {gopher_quality: none}\n")
    with pytest.raises(ConfigError, match=r"no input is matched by code/\*"):
        check_per_source(find_inputs([str(tmp_path / "b.jsonl")]).files, load_recipe([recipe]))


@pytest.mark.parametrize(
    ("data", "charset", "text"),
    [
        ("Müller".encode(), None, "Müller"),
        ("Müller".encode(), "iso-8859-1", "Müller"),  # the server is wrong
        ("Müller".encode("latin-1"), "iso-8859-1", "Müller"),
        (b"<meta charset=windows-1251>" + "Привет".encode("cp1251"), None, "Привет"),
        ("你好".encode("gb18030"), "gb2312", "你好"),
    ],
)
def test_charsets(data: bytes, charset: str | None, text: str) -> None:
    assert decode_html(data, charset).endswith(text)


def test_extraction_leaves_menus_and_scripts_out() -> None:
    document = Extraction(ExtractionSection())(Document(article(7).decode(), "file", 1, is_html=True))
    assert isinstance(document, Document)
    assert PROSE in document.text
    assert not any(word in document.text for word in ("About us", "Cookie policy", "var x", "color: red"))
    skip = b"<body><a href='#main'>Skip to main content</a><nav><a href='/'>Home</a></nav>"
    assert "Skip" not in Extraction(ExtractionSection()).extract(article(7).replace(b"<body>", skip).decode())
    deep = "<div>" * 30_000 + "at the bottom"  # takes minutes where the main content is looked for
    assert Extraction(ExtractionSection()).extract(deep) == "at the bottom"
    plain = Document("<p>not html</p>", "file", 1)
    assert Extraction(ExtractionSection())(plain) is plain
    assert plain.text == "<p>not html</p>"


def test_languages_are_identified_without_a_network() -> None:
    step = LanguageFilter(LanguageSection(languages=("en", "zh")))
    documents = {
        "en": PROSE,
        "zh": "委员会在每个月的第一个星期一在旧图书馆开会，秘书宣读上次会议的记录。",
        "de": "Das Komitee traf sich am ersten Montag des Monats in der alten Bibliothek.",
    }
    for language, text in documents.items():
        document = Document(text, "file", 1)
        kept = step(document)
        assert document.fields["language"] == language
        assert (kept is document) == (language in ("en", "zh"))
    assert step.identify("12345 \n\n ...") == ("unknown", 0.0)
    with pytest.raises(ConfigError, match="'english' is not a language"):
        check_language(LanguageSection(languages=("english",)))


def test_normalization_makes_one_spelling_of_equal_texts() -> None:
    normalize = Normalization(NormalizationSection()).normalize
    assert normalize("\ufeffcafe\u0301 \t\r\nb\u200b\x00c\r\n\r\n\r\n\r\nd  ") == "café\nbc\n\nd"
    untouched = " a \r\n"
    keep = NormalizationSection(unicode="none", control_characters="keep", whitespace="keep")
    assert Normalization(keep).normalize(untouched) == untouched
