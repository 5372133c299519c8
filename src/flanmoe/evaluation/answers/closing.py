"""Where the answer stands in a text: after a closing phrase, or in the first line.

Sources: `take_cot_answer` and `take_first_line` (FLAN, flan/v2/postprocessors.py).
"""

import re

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
SAYS_NOTHING = " \t\r.?!,;:"
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
    line = next((line for line in text.splitlines() if line.strip(SAYS_NOTHING)), "")
    return final_answer(line) or undressed(line) or None


def _last_spoken(text: str) -> tuple[int, str] | None:
    for phrase in reversed(list(_CLOSING.finditer(text))):
        rest = _REST_OF_LINE.match(text, phrase.end())
        answer = undressed(rest[1]) if rest else ""
        if answer.strip(SAYS_NOTHING):
            return phrase.start(), answer
    return None


def _last_boxed(text: str) -> tuple[int, str] | None:
    for box in reversed(list(_BOX.finditer(text))):
        content = _up_to_closing_brace(text[box.end() : box.end() + _LONGEST_BOX])
        if content is not None and undressed(content):
            return box.start(), undressed(content)
    return None


def _up_to_closing_brace(text: str) -> str | None:
    depth = 1
    for brace in _BRACE.finditer(text):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[: brace.start()]
    return None


def undressed(text: str) -> str:
    """Without emphasis and final full stop; "..." stays, for what it leaves out is not known."""
    plain = _STYLED.sub(r"\1", text).strip(_DRESS)
    if plain.endswith(".") and not plain.endswith(".."):
        plain = plain[:-1]
    return plain.strip(_DRESS)
