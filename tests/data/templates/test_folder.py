"""Families of files: which file a name leads to, what replaces what, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest

from flanmoe.core.errors import ConfigError, DataError
from flanmoe.data.templates.folder import families, load_family

Write = Callable[..., Path]

LIBRARY = families()


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a family of one wording, or a text as it stands, into the folder of the test."""

    def written(
        name: str, text: str | None = None, *, family: str = "tea", version: int = 1
    ) -> Path:
        content = text or dedent(
            f"""\
            family: {family}
            version: {version}
            needs: [leaf]
            templates:
              - name: only
                form: question
                prompt: "{{{{ leaf }}}} in version {version}?"
                response: "{{{{ answer }}}}"
            """
        )
        (tmp_path / name).write_text(content, encoding="utf-8")
        return tmp_path

    return written


def asked(name: str, folder: Path) -> str:
    (template,) = load_family(name, folder=folder)
    return template.fill({"leaf": "L", "answer": "A"}).user


def refused(name: str, folder: Path, kind: type[Exception] = ConfigError) -> str:
    with pytest.raises(kind) as caught:
        load_family(name, folder=folder)
    return str(caught.value)


def test_a_folder_adds_families(write: Write) -> None:
    folder = write("tea.yaml")
    write("mint-tea.yml", family="mint-tea")
    write("README.md", "not a family")
    assert families(folder) == tuple(sorted([*LIBRARY, "mint-tea", "tea"]))
    assert asked("tea", folder) == "L in version 1?"
    assert asked("mint-tea", folder) == "L in version 1?"
    assert load_family("entailment", folder=folder) == load_family("entailment")


def test_templates_carry_what_the_file_says(write: Write) -> None:
    (template,) = load_family("tea", folder=write("tea.yaml", version=3))
    assert (template.name, template.family, template.version) == ("only", "tea", 3)
    assert (template.form, template.needs) == ("question", {"leaf"})


def test_a_plain_name_means_the_newest_version(write: Write) -> None:
    write("tea.yaml", version=2)
    folder = write("tea.v10.yaml", version=10)
    assert families(folder) == tuple(sorted([*LIBRARY, "tea"]))
    assert asked("tea", folder) == "L in version 10?"
    assert asked("tea.v2", folder) == "L in version 2?"
    assert refused("tea.v3", folder, DataError) == (
        "The template family `tea` has no version 3, only `tea.v2`, `tea.v10`."
    )


def test_a_higher_version_replaces_ours_and_leaves_it_at_hand(write: Write) -> None:
    folder = write("entailment.yaml", family="entailment", version=2)
    assert families(folder) == LIBRARY
    assert asked("entailment", folder) == "L in version 2?"
    assert load_family("entailment.v1", folder=folder) == load_family("entailment")
    assert load_family("entailment") == load_family("entailment.v1")


def test_the_same_version_does_not_replace_ours(write: Write) -> None:
    folder = write("entailment.yaml", family="entailment", version=1)
    expected = (
        "A family that replaces one of ours must have a version above 1, but `entailment` in "
        f"{folder} has version 1. Raise `version`, or choose another name."
    )
    assert refused("entailment", folder) == expected
    assert refused("entailment.v1", folder) == expected
    assert load_family("sentiment", folder=folder) == load_family("sentiment")


def test_a_changed_file_is_read_again(write: Write) -> None:
    folder = write("tea.yaml", version=1)
    assert asked("tea", folder) == "L in version 1?"
    file = write("tea.yaml", version=2) / "tea.yaml"
    assert file.stat().st_mtime_ns > 0
    assert asked("tea", folder) == "L in version 2?"


def test_unknown_names(write: Write) -> None:
    folder = write("tea.yaml")
    known = ", ".join(f"`{name}`" for name in sorted([*LIBRARY, "tea"]))
    assert refused("entailmint", folder, DataError) == (
        "The template family `entailmint` is not known. Did you mean `entailment`? Known: "
        f"{known}, and `flan/<data set>`."
    )
    assert refused("tae.v1", folder, DataError).startswith(
        "The template family `tae` is not known. Did you mean `tea`?"
    )
    with pytest.raises(DataError) as caught:
        load_family("tea")
    assert "`tea`," not in str(caught.value)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    expected = f"The folder of templates {tmp_path / 'none'} does not exist. Check the path."
    assert refused("entailment", tmp_path / "none", DataError) == expected
    with pytest.raises(DataError) as caught:
        families(tmp_path / "none")
    assert str(caught.value) == expected


@pytest.mark.parametrize("name", ["coffee.yaml", "coffee.v1.yaml", "coffee.v7.yaml"])
def test_a_file_is_called_after_its_family(write: Write, name: str) -> None:
    folder = write(name, version=7)
    assert refused("coffee", folder) == (
        f"{folder / name} must be called after what it holds, but holds version 7 of `tea`. Call it "
        "`tea.yaml` or `tea.v7.yaml`."
    )


def test_a_file_is_called_after_its_version(write: Write) -> None:
    folder = write("tea.v1.yaml", version=2)
    assert refused("tea", folder) == (
        f"{folder / 'tea.v1.yaml'} must be called after what it holds, but holds version 2 of `tea`. Call "
        "it `tea.yaml` or `tea.v2.yaml`."
    )


def test_a_version_stands_in_one_file(write: Write) -> None:
    write("tea.yaml", version=2)
    folder = write("tea.v2.yaml", version=2)
    assert refused("tea", folder) == (
        f"The versions of a family must differ, but {folder} holds `tea.v2` more than once. Remove all "
        "but one."
    )


GOOD = """
  - name: good
    form: question
    prompt: "{{ leaf }}"
    response: "{{ answer }}"
"""


def family_file(templates: str, *, needs: str = "[leaf]", head: str = "version: 1") -> str:
    return f"family: tea\n{head}\nneeds: {needs}\ntemplates:{templates}"


def wording(name: str = "other", form: str = "question", **texts: str) -> str:
    prompt = texts.get("prompt", "{{ leaf }} again")
    response = texts.get("response", "{{ answer }}")
    return f"  - {{name: {name}, form: {form}, prompt: '{prompt}', response: '{response}'}}\n"


BAD_FILES = {
    "no templates": (
        family_file(" []"),
        ["templates: Tuple should have at least 1 item after validation, not 0, but is []."],
    ),
    "a name twice": (
        family_file(GOOD + wording("good") + wording("x") + wording("x")),
        ["templates: must have different names; found `good`, `x` more than once."],
    ),
    "a field that is not listed": (
        family_file(GOOD + wording(prompt="{{ leef }} {{ leaf }} {{ zest }}")),
        [
            "templates.1: may name the fields in `needs` (`leaf`) and those that are always given; found "
            "`leef`, `zest`. Did you mean `leaf`?"
        ],
    ),
    "a misspelt field that is always given": (
        family_file(GOOD + wording(prompt="{{ leaf }} {{ optoins }}")),
        [
            "templates.1: may name the fields in `needs` (`leaf`) and those that are always given; found "
            "`optoins`. Did you mean `options`?"
        ],
    ),
    "a field of the response that is not listed": (
        family_file(wording(prompt="Why?", response="{{ leaf }}"), needs="[]").replace(
            "templates:", "templates:\n"
        ),
        [
            "templates.0: may name the fields in `needs` (none) and those that are always given; found "
            "`leaf`."
        ],
    ),
    "a field that nothing uses": (
        family_file(GOOD, needs="[leaf, cup, spoon]"),
        ["templates: must use every field in `needs`; found none that uses `cup`, `spoon`."],
    ),
    "a field listed twice": (
        family_file(GOOD, needs="[leaf, leaf]"),
        ["needs: must have different names; found `leaf` more than once."],
    ),
    "a field that is always given": (
        family_file(GOOD, needs="[leaf, options, answer]"),
        ["needs: must leave out what is always given; found `answer`, `options`."],
    ),
    "invalid jinja": (
        family_file(
            GOOD + wording(prompt="{% if leaf %}") + wording("third", response="{{ 1 + }}")
        ),
        [
            "templates.1.prompt: must be valid jinja2, but is not: Unexpected end of template. Jinja was "
            "looking for the following tags: 'elif' or 'else' or 'endif'. The innermost block that needs to "
            "be closed is 'if'. (line 1).",
            "templates.2.response: must be valid jinja2, but is not: unexpected 'end of print "
            "statement' (line 1).",
        ],
    ),
    "a filter that does not exist": (
        family_file(GOOD + wording(prompt="{{ leaf | steep }}")),
        [
            "templates.1.prompt: must be valid jinja2, but is not: No filter named 'steep'. (line 1)."
        ],
    ),
    "a question that shows its answer": (
        family_file(GOOD + wording(prompt="{{ leaf }} {{ target }} {{ answer }}")),
        [
            "templates.1: a prompt of the form `question` must not show the answer; found `answer`, `target` "
            "in it. Take it out, or make the form `inversion`."
        ],
    ),
    "a chain of thought that shows its reasoning": (
        family_file(GOOD + wording(form="chain_of_thought", prompt="{{ leaf }} {{ rationale }}")),
        [
            "templates.1: a prompt of the form `chain_of_thought` must not show the answer; found "
            "`rationale` in it. Take it out, or make the form `inversion`."
        ],
    ),
    "an unknown form": (
        family_file(GOOD + wording(form="riddle")),
        [
            "templates.1.form: Input should be 'question', 'chain_of_thought' or 'inversion', but is "
            "'riddle'."
        ],
    ),
    "empty texts": (
        family_file(GOOD + wording(prompt="", response="")),
        [
            "templates.1.prompt: String should have at least 1 character, but is ''.",
            "templates.1.response: String should have at least 1 character, but is ''.",
        ],
    ),
    "a name with a space": (
        family_file(GOOD + wording("two words")),
        [
            "templates.1.name: String should match pattern '^[a-z0-9]+([_-][a-z0-9]+)*$', but is "
            "'two words'."
        ],
    ),
    "an unknown key": (
        family_file(GOOD + "    promt: x\n"),
        [
            "templates.0.promt: unknown key `promt`. Did you mean `prompt`? Known: `name`, `form`, "
            "`prompt`, `response`."
        ],
    ),
    "several problems": (
        "family: tea\nversion: 0\ntemplates:" + GOOD,
        [
            "version: Input should be greater than or equal to 1, but is 0.",
            "needs: is required, but missing.",
        ],
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_refused(write: Write, case: str) -> None:
    text, problems = BAD_FILES[case]
    folder = write("tea.yaml", text)
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    expected = "\n".join(
        [f"{folder / 'tea.yaml'} has {count}:", *(f"  {line}" for line in problems)]
    )
    assert refused("tea", folder) == expected


def test_an_inversion_may_show_the_answer(write: Write) -> None:
    inverted = wording(form="inversion", prompt="{{ target }} {{ answer }}", response="{{ leaf }}")
    folder = write("tea.yaml", family_file("\n" + inverted))
    assert [template.form for template in load_family("tea", folder=folder)] == ["inversion"]


def test_what_is_no_yaml_is_refused(write: Write) -> None:
    folder = write("tea.yaml", "family: [tea")
    assert refused("tea", folder).startswith(
        f"The file {folder / 'tea.yaml'} is not valid YAML: line 1"
    )
