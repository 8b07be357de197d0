"""What the style guide asks of prose and a program can check."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

MOST_WORDS = 25
#: turns of phrase that the style guide names
WORDS = {
    r"\bnobody\b": "name the actor",
    r"\bthe mend\b": "the fix",
    r"\balso where\b": "even if",
    r"\bof its own\b": "its own",
    r"\bof their own\b": "their own",
    r"\bhear(s|d)? of\b": "receive",
    r"\bmakes? way\b": "let run",
    r"\bname all of\b": "pass every",
    r"\bin vain\b": "times out",
    r"\b([Ww]e|[Oo]ur|us)\b": "you, or the middleware",
    r"\bis no (list|callable|function|iterable|request|Session|string)\b": "is not a",
    r"\bhands? on\b": "send, pass, release",
    r"\btak(e|es|ing) note\b": "record",
}
_END = re.compile(r"[.!?:;·][)\"*_`]*$")
_INNER = re.compile(r"(?<!\be\.g)(?<!\bi\.e)[.!?][)\"*_]* +(?=[A-Z`*\"(])")


class Prose(NamedTuple):
    """A line of prose in a document."""

    number: int
    text: str


def lines(document: str) -> Iterator[Prose]:
    """Return the lines that are sentences: no code, tables, headings, comments or directives."""
    fence = ""
    for number, line in enumerate(document.splitlines(), start=1):
        text = line.strip()
        mark = re.match(r"(`{3,}|:{3,})", text)
        if fence:
            fence = "" if text.endswith(fence) else fence
        elif mark:
            fence = mark[1]
        elif text.startswith("<!--") and "-->" not in text:
            fence = "-->"
        elif text and not line.startswith("    ") and not re.match(r"[#|]|<!--|!\[|Next: ", text):
            yield Prose(number, re.sub(r"^([-*]|\d+\.) +", "", text))


def faults(document: str) -> list[str]:
    """Return what is wrong with the sentences of a document."""
    found = []
    for number, text in lines(document):
        plain = re.sub(r"`[^`]*`", "code", re.sub(r"\]\([^)]*\)", "", text)).replace("[", "")
        place = f"{number}: {text[:60]}"
        if _INNER.search(plain):
            found.append(f"{place}: more than one sentence")
        if not _END.search(plain):
            found.append(f"{place}: a sentence that goes on in the next line")
        if len(plain.split()) > MOST_WORDS:
            found.append(f"{place}: {len(plain.split())} words")
        if plain.rstrip(":").count(": ") > 1:
            found.append(f"{place}: more than one colon")
        found += [
            f"{place}: {match[0]!r}, write {better!r}"
            for word, better in WORDS.items()
            if (match := re.search(word, plain))
        ]
    return found
