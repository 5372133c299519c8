"""Which option of a question a text names.

Source: the filter `multi_choice_regex` (lm-evaluation-harness).
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from flanmoe.evaluation.answers.closing import final_answer
from flanmoe.evaluation.answers.sentences import PLAIN_SIGNS, sentence_ends

_OPENING = r"[\s\"'“*_(\[]*"

_MARKERS = re.compile(
    rf"""
    (?<!\w)[(\[]\s?(?P<bracketed>[A-Za-z])\s?[)\]]                  # "(B)", "[b]"
  | (?<![^\s"'*_])(?P<closed>[A-Za-z])\)                            # "B) less"
  | \b(?i:option|choice|alternative|letter)\s+["'*]*                # "option J"
    (?: (?P<named>[A-HJ-Z])(?!\w|['-]\w) | (?P<named_alone>[A-Za-z])(?=["'*]*\s*(?:[.,;:!?)]|$)) )
    # "So B is the correct answer"
  | (?:^|[.!?:,]\s+|\b(?i:so|thus|therefore|hence|that|then),?\s+)
    (?P<affirmed>[A-HJ-Z])(?=\s+(?i:is\s+the\s+(?:correct|right|best|final)\s+(?:answer|option|choice)))
  | ^[ \t"'*_]*(?P<line>[A-Za-z])["'*_]*[.:]?["'*_]*[ \t\r]*$             # alone on its line
    # At the very beginning: "B. less", "B, because", "b. less"; never "A dog", "I think", "B-complex".
  | \A{_OPENING}(?: (?P<first>[A-HJ-Z])
      (?= ["'*_]* (?: [,;:!?] | \s+[-–—=]+\s | \s+(?:because|since|as|for|is)\b ) )
      | (?P<dotted>[A-Za-z])(?=["'*_]*[.:]["'*_]*\s) )
    """,
    re.VERBOSE | re.MULTILINE,
)
# "A or B", "B, C and D", "A/B": letters that stand beside each other.
_LETTERS = re.compile(
    r"(?<![\w'.-])\(?[A-Z]\)?(?:\s*(?:,\s*or|,\s*and|\bor|\band|[,/&])\s*(?:[Oo]ption\s+)?\(?[A-Z]\)?(?![\w'-]))+"
)
_NEGATED_BEFORE = re.compile(
    r"(?:\b(?:not|never|nor|neither|rather than|instead of|except)|n't(?: be)?)\s+"
    r"(?:(?:be|is|option|choice|answer|the|an?)\s+)*[\"'(\[*]*$",
    re.IGNORECASE,
)
_NEGATED_AFTER = re.compile(
    r"[\"')\]*_.:]*\s+(?:(?:is|are|was|were|would be|seems?|looks)\s+(?:also\s+)?"
    r"(?:not|wrong|incorrect|false|impossible|unlikely|ruled out|eliminated|out)\b"
    r"|(?:is|was|does|can|are)n't\b|cannot\b|does not\b|(?:can|must) be (?:ruled out|eliminated)\b)",
    re.IGNORECASE,
)
# A closing phrase the other way round: "(B) is the correct answer".
_AFFIRMED = re.compile(
    r"(?:\s*\([^()]*\)|[\"')\]*_.:,])*\s+(?:is|must be|would be|seems to be)\s+(?:therefore\s+)?the\s+"
    r"(?:most\s+likely\s+)?(?:(?:correct|right|best|final)\s+)?(?:answer|option|choice)\b",
    re.IGNORECASE,
)
_BETWEEN_ALTERNATIVES = re.compile(
    r"[\s,;/&|+)\]\"'*.]*(?:(?:and/or|and|or|to)\b[\s,(\[\"'*]*"
    r"(?:(?:the|an?|option|choice|maybe|possibly|perhaps|also|either)\s+)*)?[(\[\"'*]*",
    re.IGNORECASE,
)
_BEFORE_FIRST = re.compile(
    rf"{_OPENING}(?:(?:the|an?|option|choice|answer|definitely|clearly)\s+{_OPENING})*",
    re.IGNORECASE,
)
_SYNONYMS = {"yes": "true", "true": "yes", "no": "false", "false": "no"}
_ARTICLE = re.compile(r"(?:an?|the)\s+(?=\S\S)", re.IGNORECASE)
_UNMARKED = ("line", "first", "dotted")
_SINGLE_LETTER = re.compile(r"(?<![A-Za-z])[A-Z](?![A-Za-z])")
_AFTER_MARKER = re.compile(r"[\s\"'*_.:)–—-]*")
_AROUND = " \t\r\n\"'*_.()[]"


@dataclass(frozen=True, slots=True, order=True)
class _Mention:
    """A place where a text names an option."""

    start: int
    end: int
    index: int


def extract_option(text: str, choices: Sequence[str]) -> int | None:
    """Return the index of the option that a text names, None where it names none or several.

    An option is named by its letter or by its own text. Letters count as "(B)", "B)", "option B", alone
    on a line, and at the very beginning before a mark or "because" ("B. less"); never inside words or
    as words ("a dog", "I think", "vitamin B", "plan B"). Texts count as whole words, in any case, a
    leading article aside; a longer one hides a shorter one inside it ("not entailed", "invalid").
    "true" and "false" stand for options "yes" and "no", and the other way round. What is denied
    ("not (B)", "(A) is wrong") is not named.

    After a closing phrase only what follows it counts: the option that it begins with, unless another
    is joined to it ("(B) or (C)"), else the only one in its first sentence that names any. Without one,
    an option that "is the correct answer" counts, else the whole text must name a single option.
    lm-eval's `multi_choice_regex` takes the first that matches, FLAN compares strings; a letter beyond
    the options is None here.
    """
    answer = final_answer(text)
    scope = (text if answer is None else answer).translate(PLAIN_SIGNS)
    mentions = _mentions(scope, choices)
    if answer is None:
        affirmed = [mention for mention in mentions if _AFFIRMED.match(scope, mention.end)]
        mentions = affirmed or mentions
    else:
        mentions = _decisive(mentions, scope)
    indices = {mention.index for mention in mentions}
    index = indices.pop() if len(indices) == 1 else len(choices)
    return index if index < len(choices) else None


def _mentions(text: str, choices: Sequence[str]) -> list[_Mention]:
    """Every option that the text names and does not deny, in order; overlaps go to the longest."""
    patterns = [_patterns_of(choice, choices) for choice in choices]
    found = [*_by_letter(text, patterns), *_by_text(text, patterns)]
    return [mention for mention in _outermost(found) if not _denied(mention, text)]


def _patterns_of(choice: str, choices: Sequence[str]) -> list[re.Pattern[str]]:
    """Patterns of an option's text and of its synonym, if no other option is called that."""
    plain = " ".join(choice.translate(PLAIN_SIGNS).split()).rstrip(".;,!")
    texts = [plain] if plain else []
    synonym = _SYNONYMS.get(plain.casefold())
    if synonym and synonym not in {other.strip().casefold() for other in choices}:
        texts.append(synonym)
    return [re.compile(_text_pattern(text), re.IGNORECASE) for text in texts]


def _text_pattern(text: str) -> str:
    stem = _ARTICLE.sub("", text, count=1) if _ARTICLE.match(text) else text
    article = r"(?:\b(?:an?|the)\s+)?" if stem != text else ""
    words = r"\s+".join(re.escape(word) for word in stem.split())
    before = r"(?<!\w)" + (r"(?<!-)(?<![0-9][,/:])" if stem[0].isalnum() else "")
    before += r"(?<!\.)" if stem[0].isdigit() else ""
    after = r"(?!\w|[-']\w)(?![.,/:][0-9])" if stem[-1].isalnum() else ""
    if stem.casefold() == "no":
        # An answer, not "no dog" or "No. 5".
        after += r"(?=\s*(?:[,;:!?)\"'*–—-]|$|\.(?!\s*[0-9])|\s(?:because|since|as)\b))"
    return before + article + words + after


def _by_letter(text: str, patterns: Sequence[list[re.Pattern[str]]]) -> Iterator[_Mention]:
    for match in _MARKERS.finditer(text):
        kind = str(match.lastgroup)
        name = match[kind]
        index = ord(name.upper()) - ord("A")
        # A letter beyond the options names none, unless it is marked as one: "f (x)" against "(F)".
        if index >= len(patterns) and (name.islower() or kind in _UNMARKED):
            continue
        if kind == "closed" and _inside_remark(text, match.start()):
            continue
        start = match.start() if kind == "bracketed" else match.start(kind)
        yield _Mention(start, match.end(), index)
        if index < len(patterns):
            yield from _with_own_text(_Mention(start, match.end(), index), text, patterns[index])
    for match in _LETTERS.finditer(text):
        for one in _SINGLE_LETTER.finditer(match[0]):
            index = ord(one[0]) - ord("A")
            if index < len(patterns):
                yield _Mention(match.start() + one.start(), match.start() + one.end(), index)


def _inside_remark(text: str, position: int) -> bool:
    """Whether a parenthesis is open here: "B)" in "(plan B)" is its end, not a marker."""
    return text.rfind("(", 0, position) > text.rfind(")", 0, position)


def _with_own_text(
    marker: _Mention, text: str, patterns: Sequence[re.Pattern[str]]
) -> Iterator[_Mention]:
    """ "(B) less" as one mention, so that another option called "less" does not count."""
    gap = _AFTER_MARKER.match(text, marker.end)
    for pattern in patterns:
        own = pattern.match(text, gap.end() if gap else marker.end)
        if own:
            yield _Mention(marker.start, own.end(), marker.index)


def _by_text(text: str, patterns: Sequence[list[re.Pattern[str]]]) -> Iterator[_Mention]:
    whole = text.strip(_AROUND)
    for index, own in enumerate(patterns):
        for pattern in own:
            for match in pattern.finditer(text):
                # "I", "a": an option only where there is nothing else.
                if len(match[0]) > 1 or match[0].isdigit() or match[0] == whole:
                    yield _Mention(match.start(), match.end(), index)


def _outermost(mentions: Sequence[_Mention]) -> list[_Mention]:
    kept: list[_Mention] = []
    furthest = -1
    for mention in sorted(set(mentions), key=lambda item: (item.start, -item.end, item.index)):
        same = kept and (mention.start, mention.end) == (kept[-1].start, kept[-1].end)
        if mention.end > furthest or same:
            kept.append(mention)
            furthest = max(furthest, mention.end)
    return kept


def _denied(mention: _Mention, text: str) -> bool:
    before = text[max(0, mention.start - 40) : mention.start]
    return bool(_NEGATED_BEFORE.search(before) or _NEGATED_AFTER.match(text, mention.end))


def _decisive(mentions: list[_Mention], answer: str) -> list[_Mention]:
    """The mentions that count after a closing phrase."""
    if not mentions:
        return []
    first = mentions[0]
    end = next(end for end in sentence_ends(answer) if end >= first.end)
    beginning = _BEFORE_FIRST.match(answer)
    begins = beginning is not None and first.start <= beginning.end()
    if begins and not _continued_by_another(mentions, answer):
        return [first]
    return [mention for mention in mentions if mention.start < end]


def _continued_by_another(mentions: Sequence[_Mention], text: str) -> bool:
    """Whether another option follows the first at once: "(B) or (C)", "B) more" where more is A."""
    for before, after in pairwise(mentions):
        if after.index != before.index:
            return bool(_BETWEEN_ALTERNATIVES.fullmatch(text[before.end : after.start]))
    return False
