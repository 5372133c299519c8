"""Evaluation: flanmoe's language models beside lm-eval's own `hf` backend, on the same requests.

    FLANMOE_DATA=DIR python benchmarks/evaluation.py --out benchmarks/results/evaluation.json

Requests are built once: MMLU 5-shot (one subject, letters), BBH chain of thought 3-shot (answers of up to
`--new-tokens` tokens), ARC-easy 0-shot (whole answers). Both get them from the same process, weights and type;
contenders take turns. lm-eval runs with `--batch-size`, its letters merged into one pass as it does by itself;
flanmoe chooses its own batches. Models: SmolLM2-135M-Instruct, the same upcycled to 8 experts, and a randomly
initialised T5 of 120 million parameters. Prints one JSON object: medians, medians of paired ratios (lm-eval's
seconds over flanmoe's), goals, the largest difference of log-likelihoods, and what share of questions is
answered differently.

With `--flips` it measures agreement instead of speed: the share of answers, and of experts chosen for the
questions' tokens, that differ between lm-eval at batch sizes 1 and 8, and between flanmoe and lm-eval at 8.
Where the processor has no instructions for bfloat16 (its library then multiplies at a small fraction of
float32's speed), the products are computed in float32 from the bfloat16 numbers and rounded once, as matrix
units do (`RoundedProducts`); `products` in the result says which it was.
"""

import argparse
import gzip
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel, T5Config

from flanmoe.core.seeds import SeedTree
from flanmoe.evaluation.answers import final_answer
from flanmoe.evaluation.lm import build_lm, quiet_lm_eval
from flanmoe.models.blocks import moe_blocks
from flanmoe.models.loading import load_model, load_tokenizer
from flanmoe.models.upcycle import UpcycleConfig, upcycle
from flanmoe.moe.recorder import RoutingRecorder

MODEL = "smollm2-135m-instruct"
SUBJECT = "abstract_algebra"
BBH_TASK = "object_counting"
LETTERS = "ABCD"
GOALS = {
    "mmlu": 5.0,
    "bbh": 2.0,
    "arc": 1.0,
    "t5 arc": 3.0,
    "t5 mmlu": 3.0,
}
# lm-eval's name for what is not part of a figure.
HARNESS: Any = HFLM

Requests = list[Instance]
Results = list[Any]


def rows(name: str) -> list[dict[str, Any]]:
    """Return the records of one file of the data folder."""
    with gzip.open(Path(os.environ["FLANMOE_DATA"]) / f"{name}.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


def asked(record: dict[str, Any], *, solved: bool = False) -> str:
    """Return a question of MMLU in the words of lm-eval's task."""
    options = "".join(
        f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, record["choices"], strict=True)
    )
    answer = f" {LETTERS[record['label']]}\n\n" if solved else ""
    return f"{record['question'].strip()}\n{options}Answer:{answer}"


def mmlu(number: int) -> tuple[Requests, list[int]]:
    """Return requests for the letters of 5-shot questions, and the right ones."""
    shown = [record for record in rows("mmlu/dev") if record["subject"] == SUBJECT]
    questions = [record for record in rows("mmlu/test") if record["subject"] == SUBJECT][:number]
    name = SUBJECT.replace("_", " ")
    shots = f"The following are multiple choice questions (with answers) about {name}.\n\n"
    shots += "".join(asked(record, solved=True) for record in shown)
    requests = [
        Instance(
            "loglikelihood", {}, (shots + asked(record), f" {letter}"), place, ("mmlu", index, 1)
        )
        for index, record in enumerate(questions)
        for place, letter in enumerate(LETTERS)
    ]
    return requests, [record["label"] for record in questions]


def arc(number: int) -> tuple[Requests, list[int]]:
    """Return requests for whole answers to 0-shot questions, and the right ones."""
    questions = [row for row in rows("arc_easy/test") if len(row["choices"]) == 4][:number]
    requests = [
        Instance(
            "loglikelihood",
            {},
            (f"Question: {record['question']}\nAnswer:", f" {choice}"),
            place,
            ("arc", index, 1),
        )
        for index, record in enumerate(questions)
        for place, choice in enumerate(record["choices"])
    ]
    return requests, [record["label"] for record in questions]


def bbh(number: int, new_tokens: int) -> tuple[Requests, list[str]]:
    """Return requests for chains of thought after three worked examples, and the right answers."""
    prompt = next(row["prompt"] for row in rows("bbh/cot_prompts") if row["task"] == BBH_TASK)
    questions = [row for row in rows("bbh/test") if row["task"] == BBH_TASK][:number]
    options = {"until": ["Q:", "\n\n"], "do_sample": False, "max_gen_toks": new_tokens}
    requests = [
        Instance(
            "generate_until",
            {},
            (f"{prompt.rstrip()}\n\nQ: {row['question']}\nA: Let's think step by step.\n", options),
            0,
            ("bbh", index, 1),
        )
        for index, row in enumerate(questions)
    ]
    return requests, [row["answer"] for row in questions]


def random_t5(vocabulary_size: int) -> PreTrainedModel:
    """Return a T5 of about 120 million parameters with random weights."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=vocabulary_size,
        d_model=512,
        d_kv=64,
        d_ff=1536,
        num_layers=12,
        num_decoder_layers=12,
        num_heads=8,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )
    return AutoModelForSeq2SeqLM.from_config(config).eval()


def choices(results: Results) -> list[int]:
    """Return which of four choices is the likeliest, question by question."""
    likelihoods = [result[0] for result in results]
    return [
        max(range(4), key=likelihoods[start : start + 4].__getitem__)
        for start in range(0, len(likelihoods), 4)
    ]


def answers(results: Results, requests: Requests) -> list[Any]:
    """Return what is compared with the right answers."""
    if requests[0].request_type == "loglikelihood":
        return choices(results)
    return [final_answer(text) for text in results]


def timed(run: Callable[[], Results]) -> tuple[float, Results]:
    """Return seconds and results."""
    start = time.perf_counter()
    results = run()
    return time.perf_counter() - start, results


def measure(
    model: PreTrainedModel,
    tokenizer: Any,
    requests: Requests,
    right: list[Any],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Let both answer the same requests in turns."""
    kind = requests[0].request_type
    seconds: dict[str, list[float]] = {"flanmoe": [], "lm-eval": []}
    results: dict[str, Results] = {}
    work: Any = None
    for _ in range(arguments.rounds):
        # New ones each round, so that nothing is remembered; building them is not timed.
        ours = build_lm(model, tokenizer)
        theirs = harness(model, tokenizer, arguments.batch_size)
        taken, results["flanmoe"] = timed(lambda lm=ours: getattr(lm, kind)(requests))
        seconds["flanmoe"].append(taken)
        taken, results["lm-eval"] = timed(
            lambda lm=theirs: getattr(lm, kind)(requests, disable_tqdm=True)
        )
        seconds["lm-eval"].append(taken)
        work = ours.work
    ratios = [b / a for a, b in zip(seconds["flanmoe"], seconds["lm-eval"], strict=True)]
    found = {name: answers(one, requests) for name, one in results.items()}
    differences = (
        {"largest_difference_of_log_likelihoods": furthest(*results.values())}
        if kind == "loglikelihood"
        else {"equal_texts": share(results["flanmoe"], results["lm-eval"])}
    )
    return {
        "questions": len(right),
        "requests": len(requests),
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "paired_ratio": statistics.median(ratios),
        "all_ratios": ratios,
        "accuracy": {name: share(one, right) for name, one in found.items()},
        "equal_answers": share(found["flanmoe"], found["lm-eval"]),
        **differences,
        "tokens": {
            name: getattr(work, f"{name}_tokens")
            for name in ("real", "padding", "shared", "generated")
        },
    }


def harness(model: PreTrainedModel, tokenizer: Any, batch_size: int) -> Any:
    """Return lm-eval's own language model."""
    backend = "seq2seq" if model.config.is_encoder_decoder else "causal"
    options = {} if backend == "seq2seq" else {"add_bos_token": False}
    with quiet_lm_eval():
        return HARNESS(
            pretrained=model, tokenizer=tokenizer, backend=backend, batch_size=batch_size, **options
        )


def share(first: Sequence[Any], second: Sequence[Any]) -> float:
    """Return the share of equal entries."""
    return sum(a == b for a, b in zip(first, second, strict=True)) / len(first)


def furthest(first: Results, second: Results) -> float:
    """Return the largest difference between two log-likelihoods of one text."""
    return max(abs(a[0] - b[0]) for a, b in zip(first, second, strict=True))


class Routes:
    """Records which experts the last tokens of each question's prompt go to, as a `Listener` too.

    Args:
        model: a decoder; of a dense one nothing is recorded.
        prompts: token ids that each question's pass ends with.
    """

    def __init__(self, model: PreTrainedModel, num_tokens: int) -> None:
        self._recorder = RoutingRecorder(moe_blocks(model))
        self._num_tokens = num_tokens
        self._numbers: dict[str, int] = {}
        self.found: dict[int, torch.Tensor] = {}

    def label(self, task: str) -> int:
        """See `flanmoe.evaluation.lm.listening`."""
        return self._numbers.setdefault(task, int(task))

    @contextmanager
    def listening(self, labels: torch.Tensor) -> Iterator[None]:
        """See `flanmoe.evaluation.lm.listening`."""
        if not self._recorder.blocks:
            yield
            return
        with self._recorder.recording(valid=(labels >= 0).reshape(-1)) as layers:
            yield
        flat = labels.reshape(-1)
        chosen = torch.stack([routing.choices.expert_ids for routing in layers], dim=1)
        for number in flat[flat >= 0].unique().tolist():
            own = chosen[flat == number]
            self.found[number] = own[-self._num_tokens :].sort(dim=-1).values

    def agreement(self, other: "Routes") -> float:
        """Return the share of (token, layer) pairs that go to the same experts."""
        same = [
            (self.found[number] == other.found[number]).all(dim=-1).double().mean()
            for number in self.found
        ]
        return float(torch.stack(same).mean())


def harness_routes(
    model: PreTrainedModel, tokenizer: Any, requests: Requests, batch_size: int
) -> Any:
    """Run lm-eval's model over the requests; return its results and the routes of every question."""
    routes = Routes(model, 16)
    contexts = {
        tuple(tokenizer(request.args[0] + request.args[1])["input_ids"][:-1]): request.doc_id
        for request in requests
    }
    lm = harness(model, tokenizer, batch_size)
    call = lm._model_call

    def recorded(inputs: torch.Tensor, **options: Any) -> torch.Tensor:
        labels = torch.full_like(inputs, -1)
        for row, tokens in enumerate(inputs.tolist()):
            for context, number in contexts.items():
                if tuple(tokens[: len(context)]) == context:
                    labels[row, : len(context)] = number
        with routes.listening(labels):
            return call(inputs, **options)

    lm._model_call = recorded
    with torch.no_grad():
        return lm.loglikelihood(requests, disable_tqdm=True), routes


def flips(model: PreTrainedModel, tokenizer: Any, requests: Requests) -> dict[str, Any]:
    """Return the shares of answers and routes that change, for the harness itself and for flanmoe."""
    results: dict[str, Results] = {}
    routes: dict[str, Routes] = {}
    for batch_size in (1, 8):
        name = f"lm-eval, batch {batch_size}"
        results[name], routes[name] = harness_routes(model, tokenizer, requests, batch_size)
    listener = Routes(model, 16)
    labelled = [
        Instance(one.request_type, {}, one.args, one.idx, (str(one.doc_id), one.doc_id, 1))
        for one in requests
    ]
    results["flanmoe"] = build_lm(model, tokenizer, listener=listener).loglikelihood(labelled)
    routes["flanmoe"] = listener
    pairs = (("lm-eval, batch 1", "lm-eval, batch 8"), ("flanmoe", "lm-eval, batch 8"))
    sparse = bool(moe_blocks(model))
    return {
        f"{first} against {second}": {
            "answers_flipped": 1 - share(choices(results[first]), choices(results[second])),
            "largest_difference_of_log_likelihoods": furthest(results[first], results[second]),
            **({"routes_flipped": 1 - routes[first].agreement(routes[second])} if sparse else {}),
        }
        for first, second in pairs
    }


class RoundedProducts(TorchDispatchMode):
    """Computes matrix products and attention of bfloat16 numbers in float32, and rounds the results once."""

    names = ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See `TorchDispatchMode`."""
        options = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = [one for one in tree_leaves((args, options)) if isinstance(one, torch.Tensor)]
        product = name in self.names or "scaled_dot_product" in name
        if not product or not tensors or tensors[0].dtype != torch.bfloat16:
            return func(*args, **options)
        args, options = tree_map_only(torch.Tensor, exact, (args, options))
        options.pop("out_dtype", None)
        return tree_map_only(torch.Tensor, rounded, func(*args, **options))


def exact(tensor: torch.Tensor) -> torch.Tensor:
    """Return bfloat16 numbers as float32, which holds every one of them."""
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def rounded(tensor: torch.Tensor) -> torch.Tensor:
    """Return float32 numbers as bfloat16."""
    return tensor.bfloat16() if tensor.dtype == torch.float32 else tensor


def products(dtype: str) -> AbstractContextManager[Any]:
    """Return what the passes run under: as they are, or with products rounded once."""
    hardware = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return nullcontext() if dtype == "float32" or hardware else RoundedProducts()


def models(arguments: argparse.Namespace) -> Iterator[tuple[str, Callable[[], PreTrainedModel]]]:
    """Yield the models by name, each loaded when its turn comes."""

    def sparse() -> PreTrainedModel:
        config = UpcycleConfig(num_experts=8, top_k=2, mode="noise", noise_std=0.05)
        return upcycle(load_model(MODEL), config, SeedTree(0)).eval()

    every: dict[str, Callable[[], PreTrainedModel]] = {
        "dense": lambda: load_model(MODEL),
        "sparse": sparse,
        "t5": lambda: random_t5(len(load_tokenizer(MODEL))),
    }
    for name in arguments.models.split(","):
        yield name, every[name]


def main() -> None:
    """Run the benchmark and print its JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--questions", type=int, default=100, help="of MMLU and of ARC")
    parser.add_argument("--chains", type=int, default=16, help="questions of BBH")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8, help="of lm-eval")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", default="dense,sparse,t5")
    parser.add_argument("--tasks", default="mmlu,arc,bbh")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--flips", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        "benchmark": "evaluation",
        "dtype": arguments.dtype,
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "bfloat16_in_hardware": torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        "products": type(products(arguments.dtype)).__name__,
        "lm_eval_batch_size": arguments.batch_size,
        "new_tokens": arguments.new_tokens,
        "rounds": arguments.rounds,
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "lm_eval")},
        "results": {},
    }
    tokenizer = load_tokenizer(MODEL)
    tasks: dict[str, Callable[[], tuple[Requests, list[Any]]]] = {
        "mmlu": lambda: mmlu(arguments.questions),
        "arc": lambda: arc(arguments.questions),
        "bbh": lambda: bbh(arguments.chains, arguments.new_tokens),
    }
    for name, load in models(arguments):
        model = load().to(getattr(torch, arguments.dtype))
        for task in arguments.tasks.split(","):
            requests, right = tasks[task]()
            if arguments.flips:
                if task == "mmlu" and name != "t5":
                    with products(arguments.dtype):
                        found = flips(model, tokenizer, requests)
                    result["results"][f"{name} {task}"] = {"questions": len(right)} | found
                    save(result, arguments.out)
                continue
            found = measure(model, tokenizer, requests, right, arguments)
            goal = GOALS.get(f"{name} {task}", GOALS[task])
            found |= {"goal": goal, "goal_met": found["paired_ratio"] >= goal}
            result["results"][f"{name} {task}"] = found
            print(f"{name} {task}: {found['paired_ratio']:.2f} (goal {goal})", flush=True)
            save(result, arguments.out)
    save(result, arguments.out)
    print(json.dumps(result, indent=2))


def save(result: dict[str, Any], path: Path | None) -> None:
    """Write what there is so far."""
    if path is not None:
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
