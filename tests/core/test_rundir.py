"""`RunDir`: what may be resumed, and what a user is told otherwise."""

from pathlib import Path

import pytest

from flanmoe.core.config import Config
from flanmoe.core.errors import RunError
from flanmoe.core.rundir import RunDir, versions


class _Recipe(Config):
    name: str = "first"
    steps: int = 3


_RECIPE = _Recipe()


def _refusal(path: Path, recipe: Config, *, resume: bool) -> str:
    with pytest.raises(RunError) as raised:
        RunDir.open(path, recipe, resume=resume)
    assert raised.value.exit_code == 2
    return str(raised.value)


def test_a_new_run_writes_what_it_is(tmp_path: Path) -> None:
    run = RunDir.open(tmp_path / "deep" / "run", _RECIPE, resume=False)
    assert _Recipe.from_yaml(run.file("recipe.yaml")) == _RECIPE
    assert run.read_json("run.json")["kind"] == "_Recipe"
    assert run.read_json("versions.json")["torch"].startswith("2.")


def test_an_empty_folder_will_do(tmp_path: Path) -> None:
    assert RunDir.open(tmp_path, _RECIPE, resume=False).has("run.json")


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    assert _refusal(tmp_path, _RECIPE, resume=False) == (
        f"The output folder {tmp_path} must be empty or new, but already holds files. "
        "Add `--resume` to go on with it, or choose another folder with `--out`."
    )
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.touch()
    message = (
        f"The output folder {path} must be a folder, but is a file. Choose another with `--out`."
    )
    assert _refusal(path, _RECIPE, resume=False) == message
    assert _refusal(path, _RECIPE, resume=True) == message


def test_resume_goes_on_with_the_same_recipe(tmp_path: Path) -> None:
    RunDir.open(tmp_path / "run", _RECIPE, resume=False).log("metrics.jsonl", {"step": 1})
    resumed = RunDir.open(tmp_path / "run", _Recipe(steps=3), resume=True)
    assert resumed.rows("metrics.jsonl") == [{"step": 1}]


def test_resume_refuses_another_recipe(tmp_path: Path) -> None:
    RunDir.open(tmp_path, _RECIPE, resume=False)
    message = _refusal(tmp_path, _Recipe(steps=4), resume=True)
    assert message.startswith(
        f"`--resume` needs the recipe that {tmp_path} was started with, but this one differs (its hash is "
    )
    assert message.endswith(
        f"Compare with {tmp_path / 'recipe.yaml'}, or choose another folder with `--out`."
    )
    assert _Recipe.from_yaml(tmp_path / "recipe.yaml").steps == 3


@pytest.mark.parametrize(("make", "state"), [(False, "does not exist"), (True, "is no run folder")])
def test_resume_refuses_a_folder_that_no_run_wrote(tmp_path: Path, make: bool, state: str) -> None:
    path = tmp_path / "run"
    if make:
        path.mkdir()
        (path / "recipe.yaml").write_text("name: first\n")
    assert _refusal(path, _RECIPE, resume=True) == (
        f"`--resume` needs a folder that an earlier run wrote, but {path} {state}. "
        "Leave `--resume` out to start there."
    )


@pytest.mark.parametrize(
    ("content", "state"),
    [
        ('{"id": "abc", "host": "elsewhere"}', "is another program's: it has no `identity`."),
        ("[1, 2]", "is another program's: it has no `identity`."),
        ('{"kind": "Stu', "cannot be read as JSON: Unterminated string"),
        ("", "cannot be read as JSON: Expecting value"),
    ],
    ids=["foreign", "list", "torn", "empty"],
)
def test_resume_refuses_a_marker_that_we_did_not_finish(
    tmp_path: Path, content: str, state: str
) -> None:
    (tmp_path / "run.json").write_text(content)
    message = _refusal(tmp_path, _RECIPE, resume=True)
    assert message.startswith(
        f"`--resume` needs a folder that an earlier run wrote, but the run.json of {tmp_path} {state}"
    )
    assert message.endswith("Choose another folder with `--out`, and leave `--resume` out.")


def test_existing_opens_run_folders_only(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"is not a run folder: it has no run\.json"):
        RunDir.existing(tmp_path)
    RunDir.open(tmp_path, _RECIPE, resume=False)
    assert RunDir.existing(tmp_path).path == tmp_path


def test_missing_and_torn_results_are_named(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with pytest.raises(
        RunError, match=r"The run folder has no .*result\.json\. Finish the run first"
    ):
        run.read_json("result.json")
    run.write_text("result.json", '{"loss": ')
    with pytest.raises(RunError, match=r"result\.json is not valid JSON"):
        run.read_json("result.json")


def test_parts_of_a_run_are_folders_in_it(tmp_path: Path) -> None:
    part = RunDir(tmp_path).child("arms", "dense")
    written = part.write_json("result.json", {"loss": 1.5})
    assert written == tmp_path / "arms" / "dense" / "result.json"
    assert part.read_json("result.json") == {"loss": 1.5}


def test_absent_packages_are_recorded_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flanmoe.core.rundir._RECORDED_PACKAGES", ("pytest", "no-such-package"))
    found = versions()
    assert found["no-such-package"] == "absent"
    assert found["pytest"] == pytest.__version__
