"""Where sentences end, and typographic signs in plain characters."""

import re
from itertools import pairwise

PLAIN_SIGNS = str.maketrans("‘’‚‛“”„（）［］．：\u00a0\u2009\u202f", "''''\"\"\"()[].:   ")
_WORD_BEFORE_START = re.compile(r"(?<!\S)\S++(?=\s+[\"'“‘(\[$\\]*(?P<next>[A-Z0-9]))")
_ABBREVIATION = re.compile(
    r"(?:\w\.)+\w|[A-Z]|Mrs?|Ms|Dr|St|Mt|Ft|Jr|Sr|Prof|Rs|vs|approx|ca", re.IGNORECASE
)


def sentence_ends(text: str) -> list[int]:
    """Where sentences end. "No. 5", "Mr. Bean", "J. R. Tolkien" and "D.C. United" are not ends."""
    ends: list[int] = []
    for match in _WORD_BEFORE_START.finditer(text):
        word = match[0].rstrip("\"'”’)]*").lstrip("\"'“‘([")
        numbered = word.casefold() == "no." and match["next"].isdigit()
        if (
            word.endswith((".", "!", "?"))
            and not numbered
            and not _ABBREVIATION.fullmatch(word[:-1])
        ):
            ends.append(match.end())
    return [*ends, len(text)]


def sentences(text: str) -> list[str]:
    """Return the sentences of a text; put together they are the text."""
    return [text[start:end] for start, end in pairwise([0, *sentence_ends(text)])]
