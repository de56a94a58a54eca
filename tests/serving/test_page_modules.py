"""The chat page's modules that know no document: what node's test runner says about them."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.assets import REPOSITORY

TESTS = sorted((Path(__file__).parent / "page").glob("*.test.mjs"))
PAGE = REPOSITORY / "megatron_7b" / "serving" / "page"
MAX_LINES = 400


def test_modules_in_node():
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node on the PATH to run the page's modules with")
    version = tuple(map(int, subprocess.run([node, "--version"], capture_output=True, text=True).stdout[1:].split(".")))
    if version < (20, 19):
        pytest.skip(f"node {version} takes .js files for CommonJS; 20.19 and later look inside")
    done = subprocess.run([node, "--test", *TESTS], capture_output=True, text=True, cwd=REPOSITORY, timeout=120)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_nothing_is_inline_or_from_elsewhere():
    """What the policy would forbid, and what it could not: a model's text that is read as HTML."""
    page = (PAGE / "index.html").read_text()
    assert re.findall(r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son\w+=|javascript:", page) == []
    assert {
        address for address in re.findall(r'(?:src|href)="([^"#][^"]*)"', page) if not address.startswith("static/")
    } == set()
    for file in PAGE.glob("*.js"):
        source = re.sub(r"^\s*(//|\*|/\*).*$", "", file.read_text(), flags=re.MULTILINE)
        forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|DOMParser|https?://(?!www\.w3\.org/2000/svg)\w"
        assert re.findall(forbidden, source) == [], file.name
        assert set(re.findall(r'from "([^"]*)"', source)) <= {f"./{one.name}" for one in PAGE.glob("*.js")}, file.name


def test_words_that_the_page_names_are_there():
    words = (PAGE / "words.js").read_text()
    known = set(re.findall(r"^    (\w+):", words, flags=re.MULTILINE))
    named = set(re.findall(r'data-words(?:-label|-placeholder)?="(\w+)"', (PAGE / "index.html").read_text()))
    for file in PAGE.glob("*.js"):
        named |= set(re.findall(r'\bsay\("(\w+)"', file.read_text()))
    assert named - known == set()


def test_modules_stay_short():
    assert {file.name for file in PAGE.glob("*.js") if len(file.read_text().splitlines()) > MAX_LINES} == set()
