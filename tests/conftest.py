"""Shared set-up of the tests: offline, one seedable place for temporary folders, shapes checked.

The import hook wraps every annotated function of the tensor packages in a beartype and jaxtyping check, so
each test also checks the shapes in the signatures it runs through. Compile tests need the plain functions:
they run in a process of their own with `FLANMOE_CHECK_SHAPES=0` (tests/moe/test_compile.py).
"""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import settings

from flanmoe.core.cores import usable_cores

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny models gain nothing from threads; on a busy machine they wait for each other most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

if os.environ.get("FLANMOE_CHECK_SHAPES", "1") == "1":
    from jaxtyping import install_import_hook

    # All but configurations of transformers' kind, whose constructors take more than their signature says.
    _package = Path(find_spec("flanmoe").submodule_search_locations[0])
    _models = [
        ".".join(("flanmoe", *path.relative_to(_package).with_suffix("").parts))
        for path in (_package / "models").rglob("*.py")
        if path.name not in ("__init__.py", "configuration.py")
    ]
    # Packages and modules whose public seams carry shapes.
    checked = [
        "flanmoe.moe",
        *_models,
        "flanmoe.statistics",
        "flanmoe.data",
        "flanmoe.training.batch_forms",
        "flanmoe.training.cross_entropy",
        "flanmoe.training.router_losses",
        "flanmoe.training.rows",
        "flanmoe.training.trainer",
        "flanmoe.evaluation.lm",
        "flanmoe.evaluation.routing",
        "flanmoe.stages.expert_batches",
    ]
    install_import_hook(checked, "beartype.beartype")

# A shell starts background jobs with Ctrl-C ignored, and children inherit that; tests of Ctrl-C need it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Deadlines measure the machine, not the code; speed lives in benchmarks/.
settings.register_profile("flanmoe", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("flanmoe")


# Files whose tests start processes, train or read much: a few seconds each, a minute and a half together.
_SLOW_FILES = (
    "cli/test_data.py",
    "cli/test_eval.py",
    "cli/test_main.py",
    "data/templates/test_library.py",
    "data/test_contamination.py",
    "data/test_store.py",
    "data/test_stream.py",
    "evaluation/test_answers.py",
    "models/flan_moe_t5/test_t5_upcycle.py",
    "models/flan_moe_t5/test_switch.py",
    "models/flan_moe_t5/test_flan_moe_t5.py",
    "stages/test_pretrain.py",
    "stages/test_export.py",
    "stages/test_inspect.py",
    "cli/test_export.py",
    "cli/test_inspect.py",
    "cli/test_upcycle.py",
    "study/test_graph.py",
    "evaluation/suites/test_prompted_suite.py",
    "evaluation/suites/test_run.py",
    "evaluation/tasks/test_harness.py",
    "models/test_memory.py",
    "models/test_upcycle.py",
    "moe/routers/test_invariants.py",
    "moe/test_losses.py",
    "study/test_child.py",
    "study/test_freezing.py",
    "study/test_main_job.py",
    "study/test_plan.py",
    "study/test_plots.py",
    "study/test_recorded_numbers.py",
    "study/test_report.py",
    "test_examples.py",
    "training/test_freezing.py",
    "training/test_router_losses.py",
    "training/test_trainer.py",
    "training/test_tune.py",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave those files out of `make test-fast`; `make test` runs them."""
    here = Path(__file__).parent
    slow = {here / name for name in _SLOW_FILES}
    missing = sorted(str(path) for path in slow if not path.exists())
    assert not missing, f"named as slow, but not there: {missing}"
    for item in items:
        if item.path in slow:
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Take the cores that this process may use; xdist itself counts those of the whole machine."""
    return usable_cores()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="session")
def in_two_processes() -> Callable[..., None]:
    """Run a script in two processes, as torchrun would; nothing may go to stdout."""

    def run(script: Path, *arguments: object) -> None:
        shared = {
            **os.environ,
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
        }
        processes = [
            subprocess.Popen(
                [sys.executable, str(script), *map(str, arguments)],
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        try:
            for process in processes:
                out, errors = process.communicate(timeout=180)
                assert process.returncode == 0, errors[-3000:]
                assert out == ""
        finally:
            # Where one has failed, the other waits for it.
            for process in processes:
                process.kill()
                process.communicate()

    return run
