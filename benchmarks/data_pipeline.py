"""Rendering, tokenising and packing: flanmoe beside TRL's own preparation, on the same examples.

    python -m pip install --no-deps --target TRL trl
    FLANMOE_DATA=DIR python benchmarks/data_pipeline.py --trl TRL --out benchmarks/results/data_pipeline.json

Both get the same draws of real sets and the same tokenizer, at rows of 1,024 tokens. TRL is what `SFTTrainer`
calls on a prompt-completion data set (`_prepare_dataset`: chat template, tokens, labels, best-fit decreasing),
with caching off; its questions and answers are written beforehand, ours are rendered in the measured time.
Every measurement is a process of its own, contenders take turns, and imports are not counted. On one core the
tokenizer of flanmoe has one thread and TRL one process; on two it has two threads and TRL two processes.

Then the start of a mixture of a million generated examples, and the memory it takes. Prints one JSON object
with medians and the median of paired ratios.
"""

import argparse
import importlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets

from flanmoe.core.cache import cache_root
from flanmoe.core.memory import peak_memory_bytes, peak_memory_of_children_bytes
from flanmoe.core.seeds import SeedTree
from flanmoe.data.chat import render_chat
from flanmoe.data.mixture import Mixture, MixtureConfig
from flanmoe.data.packing import PackingConfig, assign_rows, tokenize_all
from flanmoe.data.renderers import Occasion
from flanmoe.data.stream import PackedStream
from flanmoe.models.loading import load_tokenizer

SETS = ("gsm8k", "alpaca", "mnli", "p3")
LENGTH = 1024
MODEL = "smollm2-135m-instruct"
PAIRS = (("flanmoe, 1 core", "trl, 1 core"), ("flanmoe, 2 cores", "trl, 2 cores"))
REPEATED = "flanmoe, 1 core, texts seen before"


def resident(field: str) -> int:
    """Return a field of the process's memory status in bytes; RssAnon leaves mapped files out."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def real_stream(arguments: argparse.Namespace, *, token_cache: bool = False) -> Any:
    """Return the stream over those of the real sets that are there."""
    tasks = [{"name": name, "on_bad_record": "skip"} for name in present_sets()]
    config = MixtureConfig.parse({"tasks": tasks, "maximum_per_task": 3000})
    mixture = Mixture.load(config, seeds=SeedTree(0))
    packing = PackingConfig(length=LENGTH, window=arguments.window, token_cache=token_cache)
    return PackedStream(mixture, load_tokenizer(MODEL), packing, SeedTree(0))


def present_sets() -> list[str]:
    """Return the sets of `SETS` that the data folder holds; says which are left out."""
    folder = os.environ.get("FLANMOE_DATA")
    found = [name for name in SETS if folder and (Path(folder) / name).is_dir()]
    for name in SETS:
        if name not in found:
            print(f"{name} is left out: FLANMOE_DATA names no folder with it.", file=sys.stderr)
    return found


def drawn(stream: Any, number: int) -> list[dict[str, Any]]:
    """Return the questions and answers of the stream's first draws, as TRL takes them."""
    counts: dict[str, int] = {}
    rows: list[dict[str, Any]] = []
    for index in range(number):
        draw = stream.mixture.draw(index, counts=counts)
        task = stream.mixture.tasks[draw.task]
        counts[task.name] = counts.get(task.name, 0) + 1
        occasion = Occasion(seeds=stream.mixture.sample_seeds(draw), count_tokens=len)
        exchange = task.renderer(stream.mixture.example(draw), occasion)
        rows.append(
            {
                "prompt": [{"role": "user", "content": exchange.user}],
                "completion": [{"role": "assistant", "content": exchange.response.strip()}],
            }
        )
    return rows


def measure_flanmoe(arguments: argparse.Namespace) -> dict[str, Any]:
    """Read packed rows until all draws of the benchmark have been given."""
    again = arguments.contender == REPEATED
    stream = real_stream(arguments, token_cache=again)
    if again:
        take_windows(stream, arguments)
        stream = real_stream(arguments, token_cache=True)
    start = time.perf_counter()
    take_windows(stream, arguments)
    seconds = time.perf_counter() - start
    report = stream.report
    return {
        "seconds": seconds,
        "examples": report.num_examples,
        "tokens": report.real_tokens,
        "rows": report.rows,
        "padding_share": report.padding_share,
        "dropped": report.num_dropped,
    }


def take_windows(stream: Any, arguments: argparse.Namespace) -> None:
    """Read all rows of the benchmark's draws, and none of the next window."""
    windows = arguments.examples // arguments.window
    next(stream)
    while not (stream.state_dict()["window"] == windows - 1 and is_read(stream)):
        next(stream)
    if arguments.contender == REPEATED:
        stream._cache.close()


def is_read(stream: Any) -> bool:
    """Say whether all rows of the window begun were given."""
    return stream._given_of_window == len(stream._rows)


def measure_trl(arguments: argparse.Namespace) -> dict[str, Any]:
    """Prepare the same draws as `SFTTrainer` does before it trains."""

    # In a folder of its own, and not in the environment of the project.
    trl: Any = importlib.import_module("trl")
    datasets.disable_caching()
    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_list(drawn(real_stream(arguments), arguments.examples))
    tokenizer = load_tokenizer(MODEL)
    with tempfile.TemporaryDirectory() as folder:
        config = trl.SFTConfig(
            output_dir=folder,
            max_length=LENGTH,
            packing=True,
            dataset_num_proc=2 if arguments.contender == "trl, 2 cores" else None,
            use_cpu=True,
            bf16=False,
            report_to=[],
        )
        # What the method reads of a trainer, without a model.
        trainer: Any = SimpleNamespace(
            _tokenizer=tokenizer, chat_template=None, completion_only_loss=True
        )
        prepare: Callable[..., Any] = trl.SFTTrainer._prepare_dataset
        start = time.perf_counter()
        packed = prepare(trainer, rows, tokenizer, config, True, None, "train")
        seconds = time.perf_counter() - start
    lengths = packed["seq_lengths"]
    tokens = sum(sum(row) for row in lengths)
    return {
        "seconds": seconds,
        "examples": sum(map(len, lengths)),
        "tokens": tokens,
        "rows": len(packed),
        "padding_share": 1 - tokens / (LENGTH * len(packed)),
        # It cuts what is too long and drops nothing.
        "dropped": 0,
    }


def measure_start(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time from the names of the files to the first packed row, and memory after some windows."""
    tokenizer = load_tokenizer(MODEL)
    files = sorted(Path(arguments.folder).glob("*.jsonl"))
    before = resident("RssAnon")
    start = time.perf_counter()
    config = MixtureConfig.parse({"tasks": [str(file) for file in files]})
    mixture = Mixture.load(config, seeds=SeedTree(0))
    stream = PackedStream(mixture, tokenizer, PackingConfig(length=LENGTH), SeedTree(0))
    next(stream)
    seconds = time.perf_counter() - start
    started = resident("RssAnon") - before
    while stream.report.num_examples < 20_000:
        for _ in range(200):
            next(stream)
    return {
        "seconds_to_first_row": seconds,
        "examples": mixture.num_examples,
        "own_memory_mib_at_first_row": started / 2**20,
        "own_memory_mib_after_20000_examples": (resident("RssAnon") - before) / 2**20,
    }


def generate(folder: Path, number: int) -> int:
    """Write four files of `number` examples together; returns their bytes."""
    draw = random.Random(0)
    words = [
        "".join(draw.choices("abcdefghijklmnopqrst", k=draw.randint(2, 9))) for _ in range(5000)
    ]
    for part in range(4):
        with (folder / f"part{part}.jsonl").open("w", encoding="utf-8") as stream:
            for index in range(number // 4):
                question = " ".join(draw.choices(words, k=draw.randint(10, 60)))
                answer = " ".join(draw.choices(words, k=draw.randint(3, 30)))
                row = {"id": f"{part}-{index}", "question": f"{question}?", "answer": answer}
                stream.write(json.dumps(row) + "\n")
    return sum(file.stat().st_size for file in folder.glob("*.jsonl"))


def child(
    contender: str, arguments: argparse.Namespace, cache: Path, *extra: str
) -> dict[str, Any]:
    """Run one measurement in a process of its own."""
    threads = "2" if "2 cores" in contender else "1"
    environment = {
        **os.environ,
        "FLANMOE_CACHE": str(cache),
        "OMP_NUM_THREADS": "1",
        "RAYON_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "true" if threads == "2" else "false",
    }
    if contender.startswith("trl"):
        environment["PYTHONPATH"] = str(arguments.trl)
    command = [sys.executable, __file__, "--contender", contender, *extra]
    command += ["--examples", str(arguments.examples), "--window", str(arguments.window)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(arguments: argparse.Namespace, cache: Path) -> dict[str, Any]:
    """Let the contenders take turns."""
    names = [name for pair in PAIRS for name in pair]
    if arguments.trl is None:
        print("TRL is left out: --trl names no folder that it was installed in.", file=sys.stderr)
        names = [name for name in names if not name.startswith("trl")]
    names.append(REPEATED)
    # Stores are made here, so that no measurement waits for them.
    child("flanmoe, 1 core", arguments, cache)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(arguments.rounds):
        for name, results in found.items():
            results.append(child(name, arguments, cache))
    rates = {
        name: [result["examples"] / result["seconds"] for result in results]
        for name, results in found.items()
    }
    return {
        "contenders": {name: summary(results) for name, results in found.items()},
        "ratio_to_trl_median": {
            ours: statistics.median(a / b for a, b in zip(rates[ours], rates[peer], strict=True))
            for ours, peer in PAIRS
            if peer in rates
        },
    }


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians of one contender's rounds."""
    rates = [result["examples"] / result["seconds"] for result in results]
    return {
        "examples_per_second_median": statistics.median(rates),
        "examples_per_second_range": [min(rates), max(rates)],
        "tokens_per_second_median": statistics.median(
            result["tokens"] / result["seconds"] for result in results
        ),
        "padding_share": results[0]["padding_share"],
        "examples": results[0]["examples"],
        "dropped": results[0]["dropped"],
        "rows": results[0]["rows"],
        "peak_memory_mib_median": statistics.median(result["peak_mib"] for result in results),
    }


def padding_by_window(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return the padding share of the mixture and of each set alone, for windows of several sizes."""
    tokenizer = load_tokenizer(MODEL)
    found: dict[str, dict[str, float]] = {}
    for sets in (present_sets(), *([name] for name in present_sets())):
        tasks = [{"name": name, "on_bad_record": "skip"} for name in sets]
        config = MixtureConfig.parse({"tasks": tasks, "maximum_per_task": 3000})
        mixture = Mixture.load(config, seeds=SeedTree(0))
        counts: dict[str, int] = {}
        texts: list[Any] = []
        for index in range(arguments.examples):
            draw = mixture.draw(index, counts=counts)
            task = mixture.tasks[draw.task]
            counts[task.name] = counts.get(task.name, 0) + 1
            seeds = mixture.sample_seeds(draw)
            texts.append(
                render_chat(mixture.example(draw), task.renderer, tokenizer, task.name, seeds=seeds)
            )
        lengths = [len(one) for one in tokenize_all(texts, tokenizer)]
        shares = found[" + ".join(sets)] = {}
        for window in (64, 128, 256, 512, 1024, 2048, 4096):
            rows, real = 0, 0
            for start in range(0, len(lengths), window):
                fitting = [size for size in lengths[start : start + window] if size <= LENGTH]
                rows += len(assign_rows(fitting, capacity=LENGTH))
                real += sum(fitting)
            shares[str(window)] = 1 - real / (rows * LENGTH)
    return found


def start_up(arguments: argparse.Namespace, cache: Path) -> dict[str, Any]:
    """Start a mixture of generated examples twice, the first time with nothing in the cache."""
    with tempfile.TemporaryDirectory() as folder:
        num_bytes = generate(Path(folder), arguments.million)
        starts = [
            child("start", arguments, cache, "--folder", folder)
            for _ in range(1 + arguments.rounds)
        ]
    again = starts[1:]
    return {
        "examples": starts[0]["examples"],
        "file_mib": num_bytes / 2**20,
        "first": starts[0],
        "again_median": {
            name: statistics.median(start[name] for start in again)
            for name in again[0]
            if name != "examples"
        },
    }


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one contender in this process."""
    kinds = {"start": measure_start, "trl, 1 core": measure_trl, "trl, 2 cores": measure_trl}
    result = kinds.get(arguments.contender, measure_flanmoe)(arguments)
    # With worker processes: the largest of them beside this one.
    peak = max(peak_memory_bytes(), peak_memory_of_children_bytes())
    return {**result, "peak_mib": peak / 2**20}


def main() -> None:
    """Run the benchmark and print its JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--trl", type=Path, help="folder that TRL was installed in")
    parser.add_argument("--examples", type=int, default=8192, help="a multiple of --window")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--million", type=int, default=1_000_000, help="examples that are generated"
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        print(json.dumps(measured(arguments)))
        return
    result = whole(arguments)
    text = json.dumps(result, indent=2)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")
    print(text)


def whole(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run all parts; those that need what is not there are left out with a sentence."""
    load_tokenizer(MODEL)
    result: dict[str, Any] = {
        "benchmark": "data_pipeline",
        "tokenizer": MODEL,
        "length": LENGTH,
        "window": arguments.window,
        "sets": present_sets(),
        "rounds": arguments.rounds,
        "cores": os.cpu_count(),
        "versions": {
            name: metadata.version(name) for name in ("transformers", "tokenizers", "datasets")
        },
    }
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        # The embedded model is looked up in the cache too, and takes a minute to make.
        (cache / "models").symlink_to(cache_root() / "models")
        if result["sets"]:
            result["padding_by_window"] = padding_by_window(arguments)
            result |= compare(arguments, cache)
        result["start"] = start_up(arguments, cache)
    if arguments.trl is not None:
        found = metadata.distributions(name="trl", path=[str(arguments.trl)])
        result["versions"]["trl"] = next(iter(found)).version
    return result


if __name__ == "__main__":
    main()
