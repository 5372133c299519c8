"""Numbers read out of text, exactly or not at all.

Source: the GSM8K filters `strict-match` and `flexible-extract` (lm-evaluation-harness).
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from flanmoe.evaluation.answers.closing import SAYS_NOTHING, final_answer, undressed
from flanmoe.evaluation.answers.sentences import sentences

_LONGEST_NUMBER = 100
_LARGEST_EXPONENT = 100
_THIN_SPACES = "\u00a0\u2009\u202f"
_POWERS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALE = "|".join(_POWERS)
_UNITS = "kg|g|mg|lbs?|oz|km|m|cm|mm|ft|in|yd|mi|l|ml|hrs?|h|mins?|secs?|s|mph|am|pm|st|nd|rd|th|USD|EUR|C|F"
_TYPESET = {
    "{,}": ",",
    "\\!": "",
    "\\,": "",
    "\\$": "$",
    "\\%": "%",
    "^\\circ": "°",
    "^{\\circ}": "°",
}
_VULGAR = {
    sign: str(Fraction(unicodedata.numeric(sign)).limit_denominator(10))
    for sign in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
}
# Whatever looks like a number, readable or not. Letters before it make it a name ("B12").
_NUMBER = re.compile(
    rf"""
    (?: (?<![\w)\]}}.%])(?P<sign>[-+]) )?
    (?: (?P<currency> (?<!\w)(?: (?:US)?[$€£¥₹] | USD | EUR | GBP | Rs\.? ) \s? ) (?P<inner>-)?
      | (?<!\w) )
    (?P<body>
        [0-9]+ [ ]+ [0-9]+/[0-9]+ (?![0-9/])                       # "1 3/4"
      | (?<![\w.])\.[0-9]+                                         # ".5"
      | [0-9]+\.[0-9]+(?:\.{{3}}|…)                                # "8.33...": never exact
      | [0-9]+ (?: [.,:/'’_{_THIN_SPACES}][0-9]+ )*
    )
    (?: [eE](?P<exponent>[-+]?[0-9]+)(?!\w)
      | \s*(?:×|x|\*|·|\\times|\\cdot)\s*10\s*\^\s*\{{?(?P<power>[-+]?[0-9]+)\}}?
    )?
    (?: \s+(?P<scale>{_SCALE})\b )?
    (?: \s?[%€£¥¢₹°]+ )?
    (?: (?P<unit>{_UNITS})(?:\^\{{?[23]\}}?)?(?!\w) )?
    """,
    re.VERBOSE,
)
_DECIMAL = re.compile(
    rf"""
    (?: [0-9]+ | [1-9][0-9]{{0,2}}(?:,[0-9]{{3}})+ | [1-9][0-9]{{0,2}}(?:[{_THIN_SPACES}][0-9]{{3}})+ )?
    (?: \.[0-9]+ )?
    """,
    re.VERBOSE,
)
_RATIO = re.compile(r"(?:(?P<whole>[0-9]+) +)?(?P<above>[0-9]+)/(?P<below>[0-9]+)")
# What makes a number part of something larger: a power, a root, a sum or product with a letter.
_SPOILED_BEFORE = re.compile(r"(?:√\s?|sqrt\s?[{(\[]?|\}\s?\{|[A-Za-z)}]\s?/)$")
_SPOILED_AFTER = re.compile(
    r"\w|\s?\^|\s?(?:√|π|\\pi\b|\\sqrt)|\}\s?\{|\s?[+-]\s?[a-z]\b|[*/][a-z]\b"
)
# "not 5", and the exponent in "18 cm^2".
_NO_ANSWER = re.compile(r"(?:\b(?:not|never)\s+|\^[({]?)$", re.IGNORECASE)

_REMARK = re.compile(r"(?<=[\w%.,€])\s+\([^()]*\)")
_REASON = re.compile(r"\b(?:because|since|given that)\b(?:(?!,\s|;).)*", re.IGNORECASE)
_LIST_NUMBER = re.compile(r"^[ \t]*[0-9]{1,3}[.)](?=\s)", re.MULTILINE)
# Between two numbers: nothing but signs ("1, 2", "3 + 4", "3-4"), or a word that joins them.
_JOINED = re.compile(
    r"(?!:\s)[^\w=≈→]*"
    r"|\W*(?:to|of|out of|by|x|times|cdot|div|plus|minus|over|per|versus|vs)\W*"
    r"|.*\b(?:and|or)\W*(?:[a-z]\s?=\s?)?|,\s[a-z]\s?=\s?",
    re.IGNORECASE | re.DOTALL,
)

_SMALL: str = (
    "zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|"
    "sixteen|seventeen|eighteen|nineteen"
)
_TENS: str = "twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety"
_SPELLED = re.compile(
    rf"""
    (?P<minus>(?:minus|negative)\s+)?
    (?: (?P<tens>{_TENS})(?:[-\s](?P<ones>one|two|three|four|five|six|seven|eight|nine))?
      | (?P<small>{_SMALL}) )
    (?: \s+(?P<scale>{_SCALE}) )?
    (?: \s+[a-z]+ )?
    """,
    re.VERBOSE,
)


@dataclass(frozen=True, slots=True)
class _Number:
    """What looks like a number in a text; `value` is None where it cannot be read exactly."""

    start: int
    end: int
    value: Fraction | None


def read_number(text: str) -> Fraction | None:
    """Return the exact value of a text that is one number and nothing else; None for any other text.

    Read are "18", "18.0", "1,000", "-3", "3/4", "1 3/4", "1e3", "2 × 10^3", "5 million", "½" and their
    LaTeX forms, with a currency sign, a percent sign or a short unit. Percentages keep the number that
    stands there: "50%" is 50.
    """
    plain = undressed(plain_mathematics(text))
    match = _NUMBER.fullmatch(plain)
    return _number_at(match, plain).value if match else None


def extract_number(text: str) -> Fraction | None:
    """Return the number that a text gives as its answer, None where it gives none or several.

    After a closing phrase: the first sentence with a number; without one: the last such sentence of the
    text. In it the last number counts, as in lm-eval's `flexible-extract`, or the result of the last
    equation ("2 x 10 = 20 from the 10 boxes" is 20); remarks in parentheses and reasons ("because ...")
    do not count. None is returned instead where

    * it is joined to another number by signs alone or by a word such as "and", "or", "to": a list, a
      range, a sum that is not worked out;
    * it looks like a number but is not read exactly: times, dates, European decimals, "18 000", powers,
      roots. An earlier number never stands in for it.

    Numbers in words are read up to ninety-nine, times hundred to trillion, where they are the whole
    answer ("eighteen apples"). lm-eval drops all commas and keeps strings: "1,2" would be "12" there.
    """
    answer = final_answer(text)
    if answer is None:
        plain = plain_mathematics(_without_list_numbers(text))
        candidates = [found for line in plain.splitlines() for found in sentences(line)][::-1]
    else:
        plain = plain_mathematics(answer)
        candidates = sentences(plain)
    for sentence in candidates:
        essence = _without_asides(sentence)
        numbers = _numbers_in(essence)
        if numbers:
            return _settled(numbers, essence)
    return _spelled_number(plain)


def plain_mathematics(text: str) -> str:
    """LaTeX and typographic forms of numbers in plain characters."""
    for written, plain in _TYPESET.items():
        text = text.replace(written, plain)
    text = re.sub("[−–﹣－]", "-", text)
    text = re.sub(rf"(?<=[0-9])\s*(?=\\[dt]?frac|[{''.join(_VULGAR)}])", " ", text)
    text = re.sub(r"\\[dt]?frac\s?\{([0-9]+)\}\s?\{([0-9]+)\}", r"\1/\2", text)
    return text.translate(str.maketrans(_VULGAR))


def _numbers_in(text: str) -> list[_Number]:
    return [
        _number_at(match, text)
        for match in _NUMBER.finditer(text)
        if not _NO_ANSWER.search(text[max(0, match.start() - 10) : match.start()])
    ]


def _number_at(match: re.Match[str], text: str) -> _Number:
    before = text[max(0, match.start() - 8) : match.start()]
    spoiled = _SPOILED_BEFORE.search(before) or _SPOILED_AFTER.match(text, match.end())
    return _Number(match.start(), match.end(), None if spoiled else _value(match))


def _value(match: re.Match[str]) -> Fraction | None:
    written = match["exponent"] or match["power"] or "0"
    millions = match["currency"] and match["unit"] == "m"
    if len(match["body"]) > _LONGEST_NUMBER or len(written) > _LONGEST_NUMBER or millions:
        return None
    exponent = int(written) + _POWERS.get(match["scale"], 0)
    amount = _amount(match["body"])
    if amount is None or abs(exponent) > _LARGEST_EXPONENT:
        return None
    negative = (match["sign"] == "-") != (match["inner"] == "-")
    return (-amount if negative else amount) * Fraction(10) ** exponent


def _amount(body: str) -> Fraction | None:
    ratio = _RATIO.fullmatch(body)
    if ratio:
        above, below, whole = int(ratio["above"]), int(ratio["below"]), ratio["whole"]
        if below == 0 or (whole and above >= below):
            return None
        return int(whole or 0) + Fraction(above, below)
    if not _DECIMAL.fullmatch(body):
        return None
    return Fraction(re.sub(f"[,{_THIN_SPACES}]", "", body))


def _without_list_numbers(text: str) -> str:
    # One "18." may be an answer; two such lines are a numbered list.
    return _LIST_NUMBER.sub("", text) if len(_LIST_NUMBER.findall(text)) > 1 else text


def _without_asides(sentence: str) -> str:
    for aside in (_REMARK, _REASON):
        shorter = aside.sub("", sentence)
        if _NUMBER.search(shorter):
            sentence = shorter
    return sentence


def _settled(numbers: Sequence[_Number], text: str) -> Fraction | None:
    """The result of the last equation, else the last number; None where another is joined to it."""
    last_equals = max(text.rfind("="), text.rfind("≈"))
    chosen = next(
        (place for place, number in enumerate(numbers) if number.start > last_equals >= 0),
        len(numbers) - 1,
    )
    for left, right in pairwise(numbers[max(0, chosen - 1) : chosen + 2]):
        if left.value != right.value and _JOINED.fullmatch(text, left.end, right.start):
            return None
    return numbers[chosen].value


def _spelled_number(text: str) -> Fraction | None:
    match = _SPELLED.fullmatch(text.strip(SAYS_NOTHING).casefold())
    if not match:
        return None
    tens = 10 * (_TENS.split("|").index(match["tens"]) + 2) if match["tens"] else 0
    ones = _SMALL.split("|").index(match["ones"] or match["small"] or "zero")
    value = (tens + ones) * 10 ** _POWERS.get(match["scale"], 0)
    return Fraction(-value if match["minus"] else value)
