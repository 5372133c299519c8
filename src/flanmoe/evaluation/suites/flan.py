"""The suite of FLAN-MoE (arXiv 2305.14705, section 4; prompts and shots of Chung et al., arXiv 2210.11416).

MMLU and BIG-bench Hard are held out of the published training data, reasoning and QA are in it. How this
suite differs from the papers' stands in docs/guide/evaluation.md.
"""

from typing import NamedTuple

from flanmoe.data.tasks import TaskConfig
from flanmoe.evaluation.suites.groups import Part, PromptedGroup, PromptedSuite, PromptedTaskConfig
from flanmoe.evaluation.tasks.few_shot import Mode, OptionStyle, PromptStyle

# Hendrycks et al. (arXiv 2009.03300), table of subjects.
MMLU_SUBJECTS = [
    "abstract_algebra",
    "anatomy",
    "astronomy",
    "business_ethics",
    "clinical_knowledge",
    "college_biology",
    "college_chemistry",
    "college_computer_science",
    "college_mathematics",
    "college_medicine",
    "college_physics",
    "computer_security",
    "conceptual_physics",
    "econometrics",
    "electrical_engineering",
    "elementary_mathematics",
    "formal_logic",
    "global_facts",
    "high_school_biology",
    "high_school_chemistry",
    "high_school_computer_science",
    "high_school_european_history",
    "high_school_geography",
    "high_school_government_and_politics",
    "high_school_macroeconomics",
    "high_school_mathematics",
    "high_school_microeconomics",
    "high_school_physics",
    "high_school_psychology",
    "high_school_statistics",
    "high_school_us_history",
    "high_school_world_history",
    "human_aging",
    "human_sexuality",
    "international_law",
    "jurisprudence",
    "logical_fallacies",
    "machine_learning",
    "management",
    "marketing",
    "medical_genetics",
    "miscellaneous",
    "moral_disputes",
    "moral_scenarios",
    "nutrition",
    "philosophy",
    "prehistory",
    "professional_accounting",
    "professional_law",
    "professional_medicine",
    "professional_psychology",
    "public_relations",
    "security_studies",
    "sociology",
    "us_foreign_policy",
    "virology",
    "world_religions",
]


class _HardTask(NamedTuple):
    """One task of BIG-bench Hard.

    `options` is how its published prompts show them, `num_options` how many there are (0 for free answers).
    """

    options: OptionStyle
    num_options: float
    exemplars: str = ""
    part_of: str | None = None


# A guess among n options is right once in n times; a free answer never. Where questions differ in their
# number of options, n is the number that the task is meant to have (a few of its questions have one more or
# less), and for coloured objects the harmonic mean over its 250 questions: 118 have 18 options, 57 have 17,
# 48 have 7 and 27 have 2, so that guessing gets (118/18 + 57/17 + 48/7 + 27/2) / 250 = 0.121 of them. The
# mean over the 23 tasks is 27.3 percent; the 25.7 behind Chung et al.'s averages can only be inferred.
_COLOURED_OBJECTS = 250 / (118 / 18 + 57 / 17 + 48 / 7 + 27 / 2)
_DEDUCTION, _SHUFFLED = "logical_deduction", "tracking_shuffled_objects"
# The exemplars of the three sizes are the same three questions about three objects.
_DEDUCTION_SHOWN = "logical_deduction_five_objects"
_SHUFFLED_SHOWN = "tracking_shuffled_objects_five_objects"

BBH_TASKS = {
    "boolean_expressions": _HardTask("hidden", 2),
    "causal_judgement": _HardTask("dashed", 2),
    "date_understanding": _HardTask("listed", 6),
    "disambiguation_qa": _HardTask("listed", 3),
    "dyck_languages": _HardTask("hidden", 0),
    "formal_fallacies": _HardTask("dashed", 2),
    "geometric_shapes": _HardTask("listed", 10),
    "hyperbaton": _HardTask("listed", 2),
    "logical_deduction_three_objects": _HardTask("listed", 3, _DEDUCTION_SHOWN, _DEDUCTION),
    "logical_deduction_five_objects": _HardTask("listed", 5, _DEDUCTION_SHOWN, _DEDUCTION),
    "logical_deduction_seven_objects": _HardTask("listed", 7, _DEDUCTION_SHOWN, _DEDUCTION),
    "movie_recommendation": _HardTask("listed", 4),
    "multistep_arithmetic_two": _HardTask("hidden", 0),
    "navigate": _HardTask("dashed", 2),
    "object_counting": _HardTask("hidden", 0),
    "penguins_in_a_table": _HardTask("listed", 5),
    "reasoning_about_colored_objects": _HardTask("listed", _COLOURED_OBJECTS),
    "ruin_names": _HardTask("listed", 4),
    "salient_translation_error_detection": _HardTask("listed", 6),
    "snarks": _HardTask("listed", 2),
    "sports_understanding": _HardTask("hidden", 2),
    "temporal_sequences": _HardTask("listed", 4),
    "tracking_shuffled_objects_three_objects": _HardTask("listed", 3, _SHUFFLED_SHOWN, _SHUFFLED),
    "tracking_shuffled_objects_five_objects": _HardTask("listed", 5, _SHUFFLED_SHOWN, _SHUFFLED),
    "tracking_shuffled_objects_seven_objects": _HardTask("listed", 7, _SHUFFLED_SHOWN, _SHUFFLED),
    "web_of_lies": _HardTask("hidden", 2),
    "word_sorting": _HardTask("hidden", 0),
}

_HARD_OPENING = " Let's think step by step.\n"
_HARD_CLOSING = "So the answer is"
# The eight exemplars of Wei et al. (arXiv 2201.11903) go into the reasoning without an opening.
_WORD_PROBLEMS = PromptStyle(options="hidden", opening=" ")
_YES_OR_NO = PromptStyle(options="hidden", opening=" ", closing=_HARD_CLOSING)


def flan_suite() -> PromptedSuite:
    """Return MMLU, BIG-bench Hard, reasoning and QA, each in the modes that the papers report."""
    return PromptedSuite(
        name="flan",
        groups=(
            _mmlu("direct", "mmlu_direct", "MMLU, direct"),
            _mmlu("chain_of_thought", "mmlu_cot", "MMLU, chain of thought"),
            _hard("direct", "bbh_direct", "BIG-bench Hard, direct"),
            _hard("chain_of_thought", "bbh_cot", "BIG-bench Hard, chain of thought"),
            _reasoning(),
            _question_answering(),
        ),
        # FLAN-MoE averages these four.
        averaged=("mmlu_direct", "bbh_direct", "reasoning_cot", "qa_direct"),
    )


def _mmlu(mode: Mode, name: str, title: str) -> PromptedGroup:
    tasks = [
        PromptedTaskConfig(
            name=subject,
            questions=_part("mmlu", "validation", subject),
            exemplars=(
                _part("mmlu", "dev", subject)
                if mode == "direct"
                else Part(source=TaskConfig(name=f"exemplars/mmlu_cot/{subject}"))
            ),
            description=(
                "The following are multiple choice questions (with answers) about "
                f"{subject.replace('_', ' ')}."
            ),
            chance=1 / 4,
        )
        for subject in MMLU_SUBJECTS
    ]
    return PromptedGroup(name=name, title=title, mode=mode, shots=5, held="out", tasks=tuple(tasks))


def _hard(mode: Mode, name: str, title: str) -> PromptedGroup:
    tasks = [
        PromptedTaskConfig(
            name=task,
            questions=_part("bbh", "test", task),
            exemplars=Part(source=TaskConfig(name=f"exemplars/bbh/{known.exemplars or task}")),
            description=None,
            style=PromptStyle(options=known.options, opening=_HARD_OPENING, closing=_HARD_CLOSING),
            chance=1 / known.num_options if known.num_options else 0.0,
            part_of=known.part_of,
        )
        for task, known in BBH_TASKS.items()
    ]
    return PromptedGroup(name=name, title=title, mode=mode, shots=3, held="out", tasks=tuple(tasks))


def _reasoning() -> PromptedGroup:
    worked = Part(source=TaskConfig(name="exemplars/gsm8k_cot"))
    problems = [
        PromptedTaskConfig(
            name=name,
            questions=_part(name, "test"),
            exemplars=worked,
            style=_WORD_PROBLEMS,
            chance=0.0,
        )
        for name in ("gsm8k", "svamp", "asdiv")
    ]
    strategy = PromptedTaskConfig(
        name="strategyqa",
        questions=_part("strategyqa", "train"),
        exemplars=_part("flan_cot", "strategyqa_train"),
        drawn=True,
        style=_YES_OR_NO,
        chance=1 / 2,
    )
    return PromptedGroup(
        name="reasoning_cot",
        title="Reasoning, chain of thought",
        mode="chain_of_thought",
        shots=8,
        held="in",
        tasks=(*problems, strategy),
    )


def _question_answering() -> PromptedGroup:
    chances = {
        ("arc_easy", "test"): 1 / 4,
        ("arc_challenge", "test"): 1 / 4,
        ("boolq", "validation"): 1 / 2,
        ("ai2_science_elementary", "test"): 1 / 4,
    }
    return PromptedGroup(
        name="qa_direct",
        title="QA, direct",
        mode="direct",
        shots=0,
        held="in",
        tasks=tuple(
            PromptedTaskConfig(name=name, questions=_part(name, split), chance=chance)
            for (name, split), chance in chances.items()
        ),
    )


def _part(name: str, split: str, value: str | None = None) -> Part:
    return Part(source=TaskConfig(name=name, split=split), value=value)
