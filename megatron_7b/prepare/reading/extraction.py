"""Html to text, with resiliparse, without a clock: no page is lost because a machine is busy."""

import re
from typing import Any

from megatron_7b.prepare.document import Document, Removed
from megatron_7b.prepare.document_sections import ExtractionSection
from megatron_7b.prepare.extras import import_extra

_SKIP_LINKS = re.compile(
    r"\A(?:\W*(?:skip|jump) to (?:the )?(?:main |primary |page )?(?:content|navigation|menu|search)[ \t]*(?:\n|\Z))+",
    re.IGNORECASE,
)

_NESTING_TAG = re.compile(
    r"<(/?)(?!(?:area|br|col|dd|dt|hr|img|input|li|link|meta|option|p|source|td|th|tr|wbr)\b)[a-z]", re.IGNORECASE
)
"""A tag that may nest: neither void, nor one that the next of its kind closes."""
_MAX_DEPTH = 2000
"""Browsers stop at 512. The search for the main content takes time with the square of it: 2 s for 8,000."""


class Extraction:
    """Turns documents that are still html into their visible text; others pass."""

    name = "extraction"

    def __init__(self, section: ExtractionSection) -> None:
        self._section = section
        self._extract: Any = None

    def __call__(self, document: Document) -> Document | Removed:
        """Return the document as text."""
        if not document.is_html:
            return document
        if len(document.text) > self._section.max_megabytes * 1e6:
            detail = f"{len(document.text) / 1e6:.1f} million characters, allowed {self._section.max_megabytes:g}"
            return Removed("extraction:too_large", detail)
        document.text = self.extract(document.text)
        document.is_html = False
        return document if document.text.strip() else Removed("extraction:no_text", "nothing but markup")

    def extract(self, html: str) -> str:
        """Return the visible text of a page."""
        if self._extract is None:
            self._extract = import_extra("resiliparse.extract.html2text", "reading html").extract_plain_text
        section = self._section
        main_content = section.main_content and not is_deeper_than(html, _MAX_DEPTH)
        text = self._extract(html, main_content=main_content, alt_texts=section.alt_texts, links=section.links)
        # The one piece of navigation that its heuristics take for content.
        return _SKIP_LINKS.sub("", str(text)) if main_content else str(text)


def is_deeper_than(html: str, depth: int) -> bool:
    """Return whether more than `depth` elements may be open at once; some that were never closed count as well."""
    if html.count("<") <= depth:
        return False
    opened = 0
    for tag in _NESTING_TAG.finditer(html):
        opened += -1 if tag.group(1) else 1
        if opened > depth:
            return True
    return False


def decode_html(data: bytes, charset: str | None = None) -> str:
    """Return the bytes of a page as text.

    What is UTF-8 beyond ASCII is read as such, whatever it calls itself: nothing else looks like it, and a guess from
    few letters is often wrong. Else the charset that the server named counts, then the one that the page names, then
    what it looks like. Bytes that do not fit become U+FFFD, as in a browser.
    """
    encoding = import_extra("resiliparse.parse.encoding", "reading html")
    if not data.isascii():
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError:
            pass
    known = encoding.map_encoding_to_html5(charset, fallback_utf8=False) if charset else None
    if known is None:
        known = encoding.detect_encoding(data, html5_compatible=True, from_html_meta=True)
    return str(encoding.bytes_to_str(data, known, errors="replace"))
