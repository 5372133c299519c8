"""What recording the routing adds to an evaluation: the same requests with and without the listener.

    OMP_NUM_THREADS=2 python benchmarks/evaluation_routing.py --rounds 7

Requests come from embedded exemplars of MMLU: for each subject three worked examples before two questions,
asked for the likeliest of four letters (`score`) and for a chain of thought (`write`). Both contenders answer
them with one model, a dense one upcycled to 8 experts, and take turns in going first. Time is that of the
processor and not of the clock, so that other work on the machine hardly shows. Prints one JSON object: for each
kind the medians of seconds, the median of paired ratios (with over without), and the same for both kinds
together. Writing a report at the end is timed apart: it costs the same after any number of questions.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from lm_eval.api.instance import Instance
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flanmoe.core.seeds import SeedTree
from flanmoe.data.tasks import TaskConfig, expand, load_task
from flanmoe.evaluation.lm import build_lm
from flanmoe.evaluation.routing import RoutingListener, routing_report, write_routing
from flanmoe.models.loading import load_model, load_tokenizer
from flanmoe.models.upcycle import UpcycleConfig, upcycle

Requests = list[Instance]

GOAL = 1.02
NUM_SHOTS = 3
LETTERS = "ABCD"


def prompts(num_subjects: int) -> list[tuple[str, str]]:
    """Return subjects with prompts: worked examples and a question."""
    found: list[tuple[str, str]] = []
    subjects = list(expand([TaskConfig(name="exemplars/mmlu_cot/*")]))[:num_subjects]
    for task in (load_task(subject, data_dir=None) for subject in subjects):
        shots, asked = task.examples[:NUM_SHOTS], task.examples[NUM_SHOTS:]
        shown = "".join(
            f"Q: {one.inputs}\nA: {one.rationales[0] if one.rationales else ''} "
            f"The answer is {one.target}.\n\n"
            for one in shots
        )
        found += [(task.name, f"{shown}Q: {one.inputs}\nA:") for one in asked]
    return found


def requests(kind: str, num_subjects: int, new_tokens: int) -> Requests:
    """Return what is asked: letters to score, or answers to write."""
    settings = {"until": ["\nQ:"], "max_gen_toks": new_tokens, "do_sample": False}
    asked = prompts(num_subjects)
    if kind == "write":
        return [
            Instance("generate_until", {}, (prompt, settings), 0, (subject, number, 1))
            for number, (subject, prompt) in enumerate(asked)
        ]
    return [
        Instance("loglikelihood", {}, (prompt, f" {letter}"), place, (subject, number, 1))
        for number, (subject, prompt) in enumerate(asked)
        for place, letter in enumerate(LETTERS)
    ]


def processor_seconds(run: Callable[[], object]) -> float:
    """Return the processor's seconds that a call takes."""
    start = time.process_time()
    run()
    return time.process_time() - start


def answering(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Requests,
    listener: RoutingListener | None,
) -> Callable[[], object]:
    """Return a call that answers requests, with a language model that remembers none of them."""
    lm = build_lm(model, tokenizer, listener=listener)

    def run() -> None:
        getattr(lm, asked[0].request_type)(asked)
        if listener is not None:
            # What still waits to be counted.
            listener.counts()

    return run


def report_seconds(listener: RoutingListener) -> float:
    """Return the seconds that it takes to make and write the report."""
    with tempfile.TemporaryDirectory() as folder:
        counts = listener.counts()
        return processor_seconds(lambda: write_routing(routing_report(counts, {}), Path(folder)))


def main() -> None:
    """Run the benchmark and print its JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct", help="dense; it is upcycled")
    parser.add_argument("--subjects", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.model)
    model = upcycle(load_model(arguments.model), UpcycleConfig(), SeedTree(0)).eval()
    seconds: dict[str, dict[str, list[float]]] = {}
    listener = RoutingListener(model)
    for kind in ("score", "write"):
        asked = requests(kind, arguments.subjects, arguments.new_tokens)
        seconds[kind] = {"without": [], "with": []}
        for number in range(arguments.rounds + 1):
            # The first round warms up.
            for name in ("without", "with") if number % 2 else ("with", "without"):
                run = answering(model, tokenizer, asked, listener if name == "with" else None)
                taken = processor_seconds(run)
                if number:
                    seconds[kind][name].append(taken)
    seconds["both"] = {
        name: [a + b for a, b in zip(seconds["score"][name], seconds["write"][name], strict=True)]
        for name in ("without", "with")
    }
    result = {
        "benchmark": "evaluation_routing",
        "model": arguments.model + "+upcycled-8x2-granular",
        "subjects": arguments.subjects,
        "new_tokens": arguments.new_tokens,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rounds": arguments.rounds,
        "goal": GOAL,
        "kinds": {
            kind: {
                "seconds_without": statistics.median(own["without"]),
                "seconds_with": statistics.median(own["with"]),
                "ratio_median": statistics.median(
                    b / a for a, b in zip(own["without"], own["with"], strict=True)
                ),
            }
            for kind, own in seconds.items()
        },
        "report_seconds": report_seconds(listener),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
