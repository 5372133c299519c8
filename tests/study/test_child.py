"""Child processes: what they answer, what a death without an answer is called, and what the parent holds."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flanmoe.core.console import Progressed
from flanmoe.core.errors import FlanmoeError, Interrupted, UserError
from flanmoe.study.child import Errand, ask


def errand(task: str, traceback_file: Path | None = None, **values: object) -> Errand:
    """Something to be done for a job that does not exist."""
    return Errand(task, values, "Arm `dense` (seed 0)", "Lower `length`.", traceback_file)


def instead_of_the_report(statement: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let child processes run a statement when they import what writes the report."""
    (folder / "sitecustomize.py").write_text(
        "import os, signal, sys, time\n"
        "class Hook:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == 'flanmoe.study.outcome': {statement}\n"
        "sys.meta_path.insert(0, Hook())\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_an_unexpected_error_before_the_folder_is_there_is_one_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    details = tmp_path / "arms" / "dense" / "seed-0" / "traceback.txt"
    with pytest.raises(FlanmoeError) as caught:
        ask(errand("run_leg", details, nonsense=1))
    assert caught.value.exit_code == 1
    assert str(caught.value).startswith("An unexpected TypeError stopped the command: run_leg()")
    assert str(caught.value).endswith(f"The details are in {details}; please report it.")
    assert details.read_text().startswith("Traceback (most recent call last)")
    assert "Traceback" not in capfd.readouterr().err


def test_a_mistake_keeps_its_exit_status(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a run folder: it has no run\.json"):
        ask(errand("report", folder=str(tmp_path)))


@pytest.mark.parametrize(
    ("ending", "kind", "sentence"),
    [
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            FlanmoeError,
            "Arm `dense` (seed 0) ended with signal 9 (Killed) before its process could say why. "
            "Lower `length`.",
        ),
        (
            "os._exit(7)",
            FlanmoeError,
            "Arm `dense` (seed 0) ended with exit status 7 before its process could say why. "
            "Lower `length`.",
        ),
        (
            "signal.signal(signal.SIGINT, signal.SIG_DFL); os.kill(os.getpid(), signal.SIGINT)",
            Interrupted,
            "Arm `dense` (seed 0) was stopped by Ctrl-C.",
        ),
    ],
    ids=["killed", "exit", "ctrl-c"],
)
def test_a_death_without_an_answer_is_named(
    ending: str,
    kind: type[FlanmoeError],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    instead_of_the_report(ending, tmp_path, monkeypatch)
    with pytest.raises(kind) as caught:
        ask(errand("report", folder=str(tmp_path)))
    assert str(caught.value) == sentence


def test_a_child_that_is_told_to_stop_answers_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = "os.kill(os.getpid(), signal.SIGINT); time.sleep(60)"
    instead_of_the_report(stop, tmp_path, monkeypatch)
    with pytest.raises(Interrupted, match=r"^Arm `dense` \(seed 0\) was stopped by Ctrl-C\.$"):
        ask(errand("report", folder=str(tmp_path)))


class Heard:
    """Keeps what a child says."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.steps: list[tuple[str, Progressed]] = []
        self.ends: list[str] = []

    def said(self, line: str) -> None:
        """Keep a line."""
        self.lines.append(line)

    def progressed(self, name: str, progress: Progressed) -> None:
        """Keep a step."""
        self.steps.append((name, progress))

    def ended(self, name: str) -> None:
        """Keep an end."""
        self.ends.append(name)


def test_who_draws_the_screen_hears_lines_and_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    talk = (
        "import flanmoe.core.console as c; c.say('first line'); sys.stderr.write('old\\rnew\\n'); "
        "bar = c.progress('  Tuning', total=3, unit='steps'); bar.__enter__()(3, note='loss'); "
        "bar.__exit__(None, None, None)"
    )
    instead_of_the_report(talk, tmp_path, monkeypatch)
    heard = Heard()
    with pytest.raises(UserError, match="is not a run folder"):
        ask(errand("report", folder=str(tmp_path)), watch=heard)
    name = "Arm `dense` (seed 0)"
    assert heard.lines == ["first line", "new"]
    assert heard.steps == [
        (name, Progressed("Tuning", 0, 3, "steps", "")),
        (name, Progressed("Tuning", 3, 3, "steps", "loss")),
        (name, Progressed("Tuning", 3, 3, "steps", "", has_ended=True)),
    ]
    assert heard.ends == [name]
    # Nothing is left for the screen that the child does not own.
    assert capfd.readouterr().err == ""


_PROGRAM = """
import sys
from concurrent.futures import Future
from flanmoe.cli.main import invoke
from flanmoe.core.console import Progressed
from flanmoe.core.errors import FlanmoeError
from flanmoe.study import launch

class Spy:
    workers, remote = 1, False

    def __init__(self, *others, **named):
        pass

    def start(self, leg):
        heavy = {"torch", "transformers", "numpy", "datasets", "ray"}
        print(leg.branch.arm, sorted(heavy & set(sys.modules)))
        future = Future()
        future.set_exception(FlanmoeError("The spy has run nothing."))
        return future

    def interrupt(self):
        pass

    def close(self):
        pass

launch.LocalExecutor = Spy
sys.exit(invoke(["run", *sys.argv[1:]]))
"""


def test_the_parent_holds_no_torch_while_a_worker_runs(base: Path, tmp_path: Path) -> None:
    stage = {"stage": "evaluate", "tasks": ["exemplars/bbh/navigate"]}
    values = {"name": "tiny", "model": str(base), "stages": [stage]}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-c", _PROGRAM, str(tmp_path / "tiny.yaml")]
    command += ["--out", str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.stdout == "tiny []\n"
    assert result.returncode == 1
    # Nothing is finished, so there is nothing to report, and the error is the stage's own.
    assert result.stderr.splitlines()[-1] == "Error: The spy has run nothing."


def test_preparing_loads_nothing_of_the_report() -> None:
    program = (
        "import sys, flanmoe.study.prepare\n"
        "print(sorted({'matplotlib', 'flanmoe.study.collect', 'flanmoe.study.report'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr
