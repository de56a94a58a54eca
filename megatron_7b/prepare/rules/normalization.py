"""One spelling for what looks the same: line ends, blanks, Unicode's composed and decomposed forms."""

import re
import unicodedata

from megatron_7b.prepare.document import Document, Removed
from megatron_7b.prepare.document_sections import NormalizationSection

_LINE_ENDS = re.compile("\r\n?|\u2028|\u2029|\u0085")
_EMPTY_LINES = re.compile(r"\n{3,}")
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u200b\u2060\ufeff\ufffe\uffff]")


class Normalization:
    """Makes texts comparable; drops those in which nothing is left."""

    name = "normalization"

    def __init__(self, section: NormalizationSection) -> None:
        self._section = section

    def __call__(self, document: Document) -> Document | Removed:
        """Return the document with its text normalised."""
        document.text = self.normalize(document.text)
        return document if document.text.strip() else Removed("normalization:empty", "no visible character")

    def normalize(self, text: str) -> str:
        """Return the text itself, in one pass per rule."""
        section = self._section
        if section.whitespace == "tidy":
            text = _LINE_ENDS.sub("\n", text) if not text.isascii() or "\r" in text else text
        if section.control_characters == "remove":
            text = _CONTROL.sub("", text)
        if not text.isascii():
            match section.unicode:
                case "nfc":
                    text = unicodedata.normalize("NFC", text)
                case "nfkc":
                    text = unicodedata.normalize("NFKC", text)
        if section.whitespace == "tidy":
            text = _EMPTY_LINES.sub("\n\n", "\n".join(map(str.rstrip, text.split("\n")))).strip()
        return text
