r"""Answers read out of text that a model wrote: numbers, options, spans, the end of a chain of thought.

Every function is pure, and returns None where the text does not say one thing: an answer that cannot
be read counts as unreadable, never as a guess. `final_answer` and `direct_answer` find where the answer
stands; `extract_number`, `extract_option` and `extract_span` read it there; `same_answer` compares it
with an example's.

Sources: `take_cot_answer` and `take_first_line` (FLAN, flan/v2/postprocessors.py); the GSM8K filters
`strict-match` and `flexible-extract` and the filter `multi_choice_regex` (lm-evaluation-harness);
`normalize_answer` (SQuAD's official scorer). Where a rule departs from its source, the function says so.
"""

from flanmoe.evaluation.answers.closing import direct_answer as direct_answer
from flanmoe.evaluation.answers.closing import final_answer as final_answer
from flanmoe.evaluation.answers.numbers import extract_number as extract_number
from flanmoe.evaluation.answers.numbers import read_number as read_number
from flanmoe.evaluation.answers.options import extract_option as extract_option
from flanmoe.evaluation.answers.same import Graded as Graded
from flanmoe.evaluation.answers.same import graded_answer as graded_answer
from flanmoe.evaluation.answers.same import same_answer as same_answer
from flanmoe.evaluation.answers.spans import extract_span as extract_span
from flanmoe.evaluation.answers.spans import normalise_span as normalise_span
