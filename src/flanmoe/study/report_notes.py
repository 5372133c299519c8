"""The sentences beside the numbers of a report: what was left out or cut, and what to know of the run."""

from collections.abc import Mapping, Sequence

from flanmoe.data.packing import PackingReport, merged
from flanmoe.study.number_text import listed
from flanmoe.study.records import SeedResults
from flanmoe.study.report_data import Hardware, MixtureData
from flanmoe.study.report_routing import alerts, shared_alert_sentences

# Beyond these a sentence counts the arms.
_MOST_NAMES = 4


def notes(arms: Mapping[str, Sequence[SeedResults]], mixtures: Sequence[MixtureData]) -> list[str]:
    """What to know of the run: step 0, tasks that were skipped, sets drawn again, several machines."""
    found = [
        f"Before tuning, no logit of the upcycled {'arms' if len(names) > 1 else 'arm'} {_named(names)} "
        f"differed by more than {difference} from the dense model's on the probe text."
        for difference, names in _step0_differences(arms).items()
    ]
    results = [seed.last for seeds in arms.values() for seed in seeds if seed.last]
    found += dict.fromkeys(
        f"Task {skipped.task} was skipped: {skipped.reason}"
        for result in results
        for skipped in result.skipped
    )
    found += [note for mixture in mixtures if (note := _repeats(mixture))]
    if len(used := machines(arms)) > 1:
        names = "; ".join(f"{item.cpu}, {item.num_cores} cores" for item in used)
        found.append(f"The study ran on {len(used)} machines, so seconds do not compare: {names}.")
    return found


def _named(arms: Sequence[str]) -> str:
    return listed(arms, most=_MOST_NAMES)


def _repeats(mixture: MixtureData) -> str:
    """Say which sets were smaller than their share of the draws, all seeds together; empty for none."""
    repeated = [task for task in mixture.tasks if task.num_draws > task.num_examples > 0]
    if not repeated:
        return ""
    most = max(repeated, key=lambda task: task.num_draws / task.num_examples)
    return (
        f"{len(repeated)} of the {len(mixture.tasks)} tasks that {_named(mixture.arms)} drew from hold fewer "
        f"examples than they were drawn, so some were seen again; most often those of {most.task} "
        f"({most.num_draws:,} draws of {most.num_examples:,} examples)."
    )


def _step0_differences(arms: Mapping[str, Sequence[SeedResults]]) -> dict[str, list[str]]:
    """Return the arms by their logit difference at step 0, those that agree together."""
    found: dict[str, list[str]] = {}
    for name, seeds in arms.items():
        difference = step0_difference(seeds)
        if difference is not None:
            found.setdefault(f"{difference:.1e}", []).append(name)
    return found


def step0_difference(seeds: Sequence[SeedResults]) -> float | None:
    """The largest logit difference at step 0 of all seeds, None where nothing was upcycled."""
    differences = [seed.upcycled.step0_max_abs_diff for seed in seeds if seed.upcycled]
    return max(differences, default=None)


def machines(arms: Mapping[str, Sequence[SeedResults]]) -> list[Hardware]:
    """The machines that stages ran on, in order."""
    every = (seed for seeds in arms.values() for seed in seeds)
    found: list[Hardware] = []
    for machine in (machine for seed in every for machine in seed.machines):
        if machine not in found:
            found.append(machine)
    return found


def warnings(arms: Mapping[str, Sequence[SeedResults]]) -> list[str]:
    """What was left out or cut: of the data once where arms agree, of the questions for each arm."""
    found = {
        task: number
        for seeds in arms.values()
        for seed in seeds
        for task, number in seed.rejected.items()
    }
    sentences = [
        f"{number:,} record{'s' if number > 1 else ''} of the task {task} could not be read and "
        f"{'were' if number > 1 else 'was'} left out (`on_bad_record: skip`)."
        for task, number in found.items()
    ]
    sentences += _overlap_warnings(arms)
    sentences += _packing_warnings(arms)
    sentences += shared_alert_sentences({name: alerts(seeds) for name, seeds in arms.items()})
    for name, seeds in arms.items():
        result = seeds[0].last
        if result is not None and result.num_truncated:
            sentences.append(
                f"{result.num_truncated:,} of the {result.num_examples:,} prompts that {name} answered were "
                "cut on their left to fit into the model's positions."
            )
    return sentences


def _overlap_warnings(arms: Mapping[str, Sequence[SeedResults]]) -> list[str]:
    tunings = (t for seeds in arms.values() for seed in seeds for t in seed.tunings.values())
    left_out = {name: task.left_out for tuned in tunings for name, task in tuned.mixture.items()}
    return [
        f"{number:,} example{'s' if number > 1 else ''} of {name} {'were' if number > 1 else 'was'} left out "
        "of training because of overlap with evaluated text (`without_overlap_of`)."
        for name, number in left_out.items()
        if number
    ]


def _packing_warnings(arms: Mapping[str, Sequence[SeedResults]]) -> list[str]:
    """Sentences about draws left out or cut, all tunings of an arm together; arms that are alike together."""
    packed = {
        name: merged(tuned.packing for seed in seeds for tuned in seed.tunings.values())
        for name, seeds in arms.items()
        if seeds[0].tunings
    }
    alike: dict[tuple[int, ...], list[str]] = {}
    for name, found in packed.items():
        alike.setdefault(_left_out(found), []).append(name)
    return [
        sentence
        for (dropped, truncated, without), names in alike.items()
        for sentence in _draw_sentences(
            "draws" if len(alike) == 1 else f"draws of {_named(names)}",
            dropped=dropped,
            truncated=truncated,
            without_exemplars=without,
        )
    ]


def _draw_sentences(
    draws: str, *, dropped: int, truncated: int, without_exemplars: int
) -> list[str]:
    sentences: list[str] = []
    if dropped:
        sentences.append(
            f"{dropped:,} {draws} were left out of training because they are longer than a row "
            "(`packing.length`)."
        )
    if truncated:
        sentences.append(
            f"{truncated:,} {draws} were cut at their end to fit into a row (`packing.length`)."
        )
    if without_exemplars:
        sentences.append(
            f"{without_exemplars:,} few-shot {draws} were left out of training because not one "
            "exemplar fits before them (`template.prompt_tokens`)."
        )
    return sentences


def _left_out(packing: PackingReport) -> tuple[int, ...]:
    return packing.num_dropped, packing.num_truncated, packing.num_without_exemplars
