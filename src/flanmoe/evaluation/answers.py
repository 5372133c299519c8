r"""Answers read out of text that a model wrote: numbers, options, spans, the end of a chain of thought.

Every function is pure, and returns None where the text does not say one thing: an answer that cannot
be read counts as unreadable, never as a guess. `final_answer` and `direct_answer` find where the answer
stands; `extract_number`, `extract_option` and `extract_span` read it there; `same_answer` compares it
with an example's.

Sources: `take_cot_answer` and `take_first_line` (FLAN, flan/v2/postprocessors.py); the GSM8K filters
`strict-match` and `flexible-extract` and the filter `multi_choice_regex` (lm-evaluation-harness);
`normalize_answer` (SQuAD's official scorer). Where a rule departs from its source, the function says so.
"""

import re
import string
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from flanmoe.data.example import Example

# --- Where the answer stands --------------------------------------------------------------------

_CLOSING = re.compile(
    r"""
    (?:
        # "the answer is", "the answer to the question is", "the correct option would be"
        \b (?: answer | (?:correct|right|best|final)\s+(?:option|choice) )
        (?: \s+(?:to|for)\b [^.:?!\n]{0,80}? )?
        \s+(?:is|would\s+be|will\s+be|should\s+be|must\s+be)\b
      | \banswer [\]*_"')]{0,4} \s? [:=]                    # "Answer:", "**Final Answer**:"
      | \bfinal\s+answer (?: [\]*_]{1,4} | [ \t]*\n )       # "[Final answer] B", a heading
        # "#### 18", as GSM8K ends: a number, or the last line. Another one is a heading.
      | (?<!\#)\#{4}(?!\#) (?= [ \t]* (?: [-−+$]{0,2}[0-9][0-9.,]*[ \t]*$ | \S[^\n]{0,200}+\s*+\Z ) )
    )
    (?! \W{0,4}let['’]?s\b )                                # "Answer: Let's think step by step."
    """,
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)
_REST_OF_LINE = re.compile(r"[\s:=*_`]*+([^\n]*)")
_SAYS_NOTHING = " \t\r.?!,;:"
_BOX = re.compile(r"\\f?box(?:ed)?\s?\{")
_BRACE = re.compile(r"[{}]")
_LONGEST_BOX = 400
_DRESS = " \t\r*_`"
_STYLED = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf)\s?\{([^{}]*)\}")


def final_answer(text: str) -> str | None:
    r"""Return what follows the last closing phrase; None where there is none that says anything.

    Closing phrases are "the answer is", "the correct option is", "answer:", "[Final answer]", "####"
    and `\boxed{...}`, in any case, with or without markdown. The answer is the rest of the line (or the
    next line with text) without emphasis and full stop. FLAN's `take_cot_answer` splits phrase by
    phrase instead, keeps all the text that follows, and returns everything where there is no phrase.
    """
    endings = [ending for ending in (_last_spoken(text), _last_boxed(text)) if ending]
    return max(endings)[1] if endings else None


def direct_answer(text: str) -> str | None:
    """Return the first line with text, for prompts that ask for the answer alone; None without one.

    FLAN's `take_first_line`. A closing phrase in this line ("Answer: B") is taken off; later lines,
    where a model often goes on to a question of its own, are not looked at.
    """
    line = next((line for line in text.splitlines() if line.strip(_SAYS_NOTHING)), "")
    return final_answer(line) or _undressed(line) or None


def _last_spoken(text: str) -> tuple[int, str] | None:
    for phrase in reversed(list(_CLOSING.finditer(text))):
        rest = _REST_OF_LINE.match(text, phrase.end())
        answer = _undressed(rest[1]) if rest else ""
        if answer.strip(_SAYS_NOTHING):
            return phrase.start(), answer
    return None


def _last_boxed(text: str) -> tuple[int, str] | None:
    for box in reversed(list(_BOX.finditer(text))):
        content = _up_to_closing_brace(text[box.end() : box.end() + _LONGEST_BOX])
        if content is not None and _undressed(content):
            return box.start(), _undressed(content)
    return None


def _up_to_closing_brace(text: str) -> str | None:
    depth = 1
    for brace in _BRACE.finditer(text):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[: brace.start()]
    return None


def _undressed(text: str) -> str:
    """Without emphasis and final full stop; "..." stays, for what it leaves out is not known."""
    plain = _STYLED.sub(r"\1", text).strip(_DRESS)
    if plain.endswith(".") and not plain.endswith(".."):
        plain = plain[:-1]
    return plain.strip(_DRESS)


# --- Sentences ----------------------------------------------------------------------------------

_WORD_BEFORE_START = re.compile(r"(?<!\S)\S++(?=\s+[\"'“‘(\[$\\]*(?P<next>[A-Z0-9]))")
_ABBREVIATION = re.compile(
    r"(?:\w\.)+\w|[A-Z]|Mrs?|Ms|Dr|St|Mt|Ft|Jr|Sr|Prof|Rs|vs|approx|ca", re.IGNORECASE
)


def _sentence_ends(text: str) -> list[int]:
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


def _sentences(text: str) -> list[str]:
    ends = _sentence_ends(text)
    return [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]


# --- Numbers ------------------------------------------------------------------------------------

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
    plain = _undressed(_plain_mathematics(text))
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
        plain = _plain_mathematics(_without_list_numbers(text))
        lines = (_sentences(line) for line in plain.splitlines())
        sentences = [sentence for line in lines for sentence in line][::-1]
    else:
        plain = _plain_mathematics(answer)
        sentences = _sentences(plain)
    for sentence in sentences:
        essence = _without_asides(sentence)
        numbers = _numbers_in(essence)
        if numbers:
            return _settled(numbers, essence)
    return _spelled_number(plain)


def _plain_mathematics(text: str) -> str:
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
    match = _SPELLED.fullmatch(text.strip(_SAYS_NOTHING).casefold())
    if not match:
        return None
    tens = 10 * (_TENS.split("|").index(match["tens"]) + 2) if match["tens"] else 0
    ones = _SMALL.split("|").index(match["ones"] or match["small"] or "zero")
    value = (tens + ones) * 10 ** _POWERS.get(match["scale"], 0)
    return Fraction(-value if match["minus"] else value)


# --- Options ------------------------------------------------------------------------------------

_PLAIN_SIGNS = str.maketrans("‘’‚‛“”„（）［］．：\u00a0\u2009\u202f", "''''\"\"\"()[].:   ")
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
    scope = (text if answer is None else answer).translate(_PLAIN_SIGNS)
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
    plain = " ".join(choice.translate(_PLAIN_SIGNS).split()).rstrip(".;,!")
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
    end = next(end for end in _sentence_ends(answer) if end >= first.end)
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


# --- Spans and comparison -----------------------------------------------------------------------

_KEPT_SIGN = re.compile(r"(?<=[0-9])[./:](?=[0-9])|(?<!\w)-(?=\.?[0-9])|(?<![\w.])\.(?=[0-9])")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_TWO_ANSWERS = (("yes", "no"), ("true", "false"))


def normalise_span(text: str) -> str:
    """Return a text as SQuAD's official scorer compares it: no case, punctuation, articles, extra spaces.

    Departures: typographic quotes and dashes are punctuation like plain ones; the sign and the point of
    a number stay ("3.5" is not "35", "-3" not "3"); and what would be nothing ("] } ]", "A") stays.
    """
    plain = " ".join(_plain_mathematics(text).translate(_PLAIN_SIGNS).casefold().split())
    kept = {match.start() for match in _KEPT_SIGN.finditer(plain)}
    bare = "".join(
        character
        for position, character in enumerate(plain)
        if position in kept or not _is_punctuation(character)
    )
    return " ".join(_ARTICLES.sub(" ", bare).split()) or plain


def extract_span(text: str) -> str | None:
    """Return the answer of a text in words, normalised for comparison; None where there is none.

    It is the first sentence after the closing phrase. A text without one is a direct answer if it is a
    single line; of a longer text None is returned, for any of it would be a guess (FLAN's
    `take_cot_answer` returns all of it; give `direct_answer(text)` for its `take_first_line`).
    """
    answer = final_answer(text)
    if answer is None and len(text.split("\n")) == 1:
        answer = direct_answer(text)
    return normalise_span(_sentences(answer)[0]) if answer else None


def same_answer(text: str, example: Example) -> bool | None:
    """Say whether a text gives the answer of an example; None where no answer can be read from it.

    Options are compared by index, numbers by value ("$1,000.00" is "1000"), "yes" and "no", "true" and
    "false" as two options, all else as normalised spans. `other_targets` in an example's metadata are as
    good as its target. Give `direct_answer(text) or ""` where the prompt asked for the answer alone.
    """
    targets = (example.target, *example.metadata.get("other_targets", ()))
    values = {read_number(target) for target in targets}
    spans = {normalise_span(target) for target in targets}
    if example.label is not None:
        found, right = extract_option(text, example.choices), {example.label}
    elif pair := next((pair for pair in _TWO_ANSWERS if spans <= set(pair)), None):
        found, right = extract_option(text, pair), {pair.index(span) for span in spans}
    elif None not in values:
        found, right = extract_number(text), values
    elif not spans.isdisjoint(map(normalise_span, (text, final_answer(text) or text))):
        return True  # a target may be longer than the one sentence that a span is
    else:
        found, right = extract_span(text), spans
    return None if found is None else found in right


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")
