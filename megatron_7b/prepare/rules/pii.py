"""Personal data, masked: e-mail addresses, IP addresses, phone numbers, IBANs, card numbers.

Every pattern starts at the border of a token and repeats a bounded number of times without going back, so the time is
linear in the text, whatever the text. What a pattern finds is a candidate; arithmetic decides (checksums, ranges).
"""

import ipaddress
import re
from collections import Counter
from collections.abc import Callable

from megatron_7b.prepare.document import Document
from megatron_7b.prepare.document_sections import PiiSection

# Behind the character or class that comes first, so that the search for it is a fast one, a look at what precedes it.
_LOCAL_REVERSED = re.compile(r"[\w.%+-]{1,65}")
# Letters of scripts with spaces: in the others an `@` and a full stop are most often no address.
_LETTERS = "A-Za-z\u00c0-\u06ff\u0900-\u0dff"
_DOMAIN = re.compile(rf"(?:[{_LETTERS}0-9](?:[{_LETTERS}0-9-]{{0,62}})\.)+[{_LETTERS}]{{2,24}}")
_IPV4 = re.compile(r"[0-9](?<![\w.].)[0-9]{0,2}(?:\.[0-9]{1,3}){3}(?!\.?\w|-[A-Za-z])")
_BEFORE_VERSION = re.compile(r"(?:version|release|firmware|build|chapter|section)s?:?\s+\Z", re.IGNORECASE)
_LOOK_BACK = 16
# Global unicast only (2000::/3): `a::b` is an address too, but in texts it is C++.
_IPV6 = re.compile(r"[23](?<![\w:.].)[0-9A-Fa-f]{3}:[0-9A-Fa-f:]{1,34}+(?![\w:])")
_INTERNATIONAL_PHONE = re.compile(r"\+(?<![\w+].)[1-9](?:[ ./-]?\(?\d\)?){6,16}+(?![ -]?\d|\w)")
_AMERICAN_PHONES = (
    re.compile(r"[2-9](?<![\w.(+-].)\d\d[ .-][2-9]\d\d[ .-]\d{4}(?![\w-])"),
    re.compile(r"\((?<!\w.)[2-9]\d\d\)[ .-]?[2-9]\d\d[ .-]\d{4}(?![\w-])"),
)
_IBAN_START = re.compile(r"[A-Z](?<![A-Za-z0-9].)[A-Z]\d\d")
_CARD = re.compile(r"[2-6](?<![\w.+-].)(?:[ -]?\d){12,18}+(?![ -]?\d|\w|\.\d)")
_CARD_ISSUERS = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})|5[1-5]\d{14}|2[2-7]\d{14}|3[47]\d{13}|3[0689]\d{12}|35\d{14}|6\d{15}"
)
_MAX_LOCAL, _MAX_DOMAIN = 64, 253
_IBAN_LENGTHS = {
    country: int(length)
    for country, length in re.findall(
        r"(..)(\d\d)",
        "AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DK18 DO28 EE20 EG29 ES24 "
        "FI18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 LB28 LC32 "
        "LI21 LT20 LU20 LV21 LY25 MC27 MD24 ME22 MK19 MR27 MT31 MU30 NL18 NO15 PK24 PL28 PS29 PT25 QA29 RO24 RS22 "
        "SA24 SC31 SE24 SI19 SK24 SM27 ST25 SV28 TL23 TN24 TR26 UA29 VA22 VG24 XK20",
    )
}


class PiiMasking:
    """Replaces personal data by fixed marks; drops nothing."""

    name = "pii"

    def __init__(self, section: PiiSection) -> None:
        self.changes: Counter[str] = Counter()
        """Masked, by kind."""
        self._rules: list[Callable[[str], str]] = []
        # Accounts first: a phone number's pattern would find half of one.
        if section.accounts:
            self._rules += [
                lambda text: self._mask_ibans(text, section.account_mask),
                lambda text: self._replace(_CARD, _is_card, "card", section.account_mask, text),
            ]
        if section.emails:
            self._rules.append(lambda text: self._mask_emails(text, section.email_mask))
        if section.ip_addresses:
            self._rules += [
                lambda text: self._replace(_IPV4, _is_public, "ip", section.ip_mask, text, _BEFORE_VERSION),
                lambda text: self._replace(_IPV6, _is_public, "ip", section.ip_mask, text) if ":" in text else text,
            ]
        if section.phones:
            self._rules += [
                lambda text: self._replace(_INTERNATIONAL_PHONE, _is_phone, "phone", section.phone_mask, text),
                *(
                    lambda text, pattern=pattern: self._replace(pattern, _is_phone, "phone", section.phone_mask, text)
                    for pattern in _AMERICAN_PHONES
                ),
            ]

    def __call__(self, document: Document) -> Document:
        """Return the document with its text masked."""
        document.text = self.mask(document.text)
        return document

    def mask(self, text: str) -> str:
        """Return the text, masked; what was found is added to `changes`."""
        for rule in self._rules:
            text = rule(text)
        return text

    def _replace(
        self,
        pattern: re.Pattern[str],
        is_real: Callable[[str], bool],
        kind: str,
        mask: str,
        text: str,
        unless_behind: re.Pattern[str] | None = None,
    ) -> str:
        def decide(match: re.Match[str]) -> str:
            before = text[max(0, match.start() - _LOOK_BACK) : match.start()]
            if not is_real(match.group()) or (unless_behind is not None and unless_behind.search(before)):
                return match.group()
            self.changes[kind] += 1
            return mask

        return pattern.sub(decide, text)

    def _mask_emails(self, text: str, mask: str) -> str:
        pieces: list[str] = []
        done, at = 0, -1
        while (at := text.find("@", at + 1)) >= 0:
            local = _LOCAL_REVERSED.match(text[max(done, at - 65) : at][::-1])
            domain = _DOMAIN.match(text, at + 1, at + 1 + _MAX_DOMAIN)
            if local is None or local.end() > _MAX_LOCAL or domain is None:
                continue
            pieces += [text[done : at - local.end()], mask]
            done = domain.end()
            self.changes["email"] += 1
        return "".join([*pieces, text[done:]]) if pieces else text

    def _mask_ibans(self, text: str, mask: str) -> str:
        pieces: list[str] = []
        done = 0
        for match in _IBAN_START.finditer(text):
            end = _find_iban_end(text, match.start())
            if match.start() >= done and end is not None:
                pieces += [text[done : match.start()], mask]
                done = end
                self.changes["iban"] += 1
        return "".join([*pieces, text[done:]]) if pieces else text


def _find_iban_end(text: str, start: int) -> int | None:
    """Return where the IBAN that begins at `start` ends, or None if there is none: its country fixes its length."""
    length = _IBAN_LENGTHS.get(text[start : start + 2])
    if length is None:
        return None
    digits: list[str] = []
    position = start
    while len(digits) < length:
        # Groups are parted by single blanks.
        if text[position : position + 1] == " " and text[position - 1 : position] != " ":
            position += 1
        character = text[position : position + 1]
        if not (character.isascii() and (character.isdigit() or character.isupper())):
            return None
        digits.append(character)
        position += 1
    if text[position : position + 1].isalnum():
        return None
    number = int("".join(str(int(character, 36)) for character in digits[4:] + digits[:4]))
    return position if number % 97 == 1 else None


def _is_card(candidate: str) -> bool:
    """Return an issuer's prefix, its length, and Luhn's checksum."""
    digits = re.sub("[ -]", "", candidate)
    if not _CARD_ISSUERS.fullmatch(digits):
        return False
    doubled = (sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return (sum(doubled) + sum(int(digit) for digit in digits[-1::-2])) % 10 == 0


def _is_public(candidate: str) -> bool:
    try:
        return ipaddress.ip_address(candidate).is_global
    except ValueError:
        return False


def _is_phone(candidate: str) -> bool:
    digits = sum(character.isdigit() for character in candidate)
    return 8 <= digits <= 15 and candidate.count("(") == candidate.count(")")
