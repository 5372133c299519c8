"""FLAN's patterns as templates, against a written-out filling in; what is left out and what is refused."""

import gzip
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanmoe.core.errors import DataError
from flanmoe.data.sources.finding import DATA_VARIABLE
from flanmoe.data.templates.flan import FlanTemplates, Unconverted, flan_file, read_flan
from flanmoe.data.templates.folder import families, load_family
from flanmoe.data.templates.template import Template

NEW, OLD = "flan/v2/templates.py", "flan/templates.py"
OPTIONS = "Options:\n- dry\n- wet"


def row(
    prompt: str, response: str = "{answer}", *, dataset: str = "sky", index: int = 0, **changes: Any
) -> dict[str, Any]:
    return {
        "file": NEW,
        "group": "PATTERNS",
        "dataset": dataset,
        "index": index,
        "input_pattern": prompt,
        "target_pattern": response,
        **changes,
    }


def written(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(line) + "\n" for line in rows)
    (folder / "templates.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return folder


def read(folder: Path, rows: Sequence[dict[str, Any]]) -> FlanTemplates:
    return read_flan(written(folder, rows) / "templates.jsonl.gz")


def only(folder: Path, prompt: str, response: str = "{answer}") -> Template:
    ((template,),) = read(folder, [row(prompt, response)]).templates.values()
    return template


@pytest.fixture(autouse=True)
def _no_folder_from_outside(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "real_data_dir" not in request.fixturenames:
        monkeypatch.delenv(DATA_VARIABLE, raising=False)


@pytest.mark.parametrize(
    ("pattern", "shown", "hidden"),
    [
        ("{sky}: rain?\n\n{options_}", f"S: rain?\n\n{OPTIONS}", "S: rain?"),
        ("{sky}: rain?\n{options_}\nSay:", f"S: rain?\n{OPTIONS}\nSay:", "S: rain?\nSay:"),
        ("{options_}\n\nRain, {sky}?", f"{OPTIONS}\n\nRain, S?", "Rain, S?"),
        ("Rain ({options_}), {sky}?", f"Rain ({OPTIONS}), S?", "Rain (), S?"),
        # FLAN's deletion takes two line ends, so one of three stays.
        ("{sky}\n\n\n{options_}\n?", f"S\n\n\n{OPTIONS}\n?", "S\n\n?"),
        ("{sky}\n\n{options_str}\n\n", f"S\n\n{OPTIONS}", "S"),
        ("{sky}\n{options_}{sky}", f"S\n{OPTIONS}S", "SS"),
    ],
)
def test_options_are_shown_or_leave_no_trace(
    tmp_path: Path, pattern: str, shown: str, hidden: str
) -> None:
    template = only(tmp_path, pattern)
    assert template.needs == {"sky"}
    assert template.fill({"sky": "S", "options": OPTIONS, "answer": "A"}).user == shown
    assert template.fill({"sky": "S", "options": "", "answer": "A"}).user == hidden


_PIECES = st.sampled_from(
    ["{", "}", "{%", "%}", "{#", "#}", "{{ x }}", "-}}", "{}", "\n", " ", "{ a}"]
)


@given(before=st.lists(_PIECES), after=st.lists(_PIECES), value=st.lists(_PIECES))
def test_signs_of_jinja_are_text(
    tmp_path_factory: pytest.TempPathFactory,
    before: list[str],
    after: list[str],
    value: list[str],
) -> None:
    start, end, sky = ("<" + "".join(parts) + ">" for parts in (before, after, value))
    template = only(tmp_path_factory.mktemp("flan"), f"{start}{{sky}}{end}", f"{start}{{answer}}")
    filled = template.fill({"sky": sky, "answer": sky})
    assert filled.user == f"{start}{sky}{end}"
    assert filled.response == f"{start}{sky}"


def test_reasoning_has_our_name(tmp_path: Path) -> None:
    for mark in ("cot", "chain_of_thought"):
        template = only(tmp_path, "{sky}? Why?", f"{{{mark}}}\nSo: {{answer}}")
        assert (template.form, template.needs) == ("chain_of_thought", {"sky"})
        filled = template.fill({"sky": "S", "rationale": "Clouds.", "answer": "wet"})
        assert filled.response == "Clouds.\nSo: wet"


def test_forms_follow_from_what_is_shown_and_asked(tmp_path: Path) -> None:
    patterns = [
        ("Will {sky} bring rain?", "{answer}", "question"),
        ("{sky}. Reasons first.", "{cot} {answer}", "chain_of_thought"),
        ("Which sky brings {answer}?", "{sky}", "inversion"),
        ("{cot} Why was this said?", "{sky} {answer}", "inversion"),
        ("Describe any sky.", "{sky}", "inversion"),
    ]
    rows = [row(shown, asked, index=i) for i, (shown, asked, _) in enumerate(patterns)]
    ((*templates,),) = read(tmp_path, rows).templates.values()
    assert [template.form for template in templates] == [form for *_, form in patterns]


def test_the_answer_may_have_another_name(tmp_path: Path) -> None:
    rows = [
        row("Title {report}", "{title}", index=0),
        row("Name {report}", "{title}", index=1),
        row("Report under {title}", "{report}", index=2),
        row("Title {report}, thinking", "{cot} {title}", index=3),
    ]
    ((*templates,),) = read(tmp_path, rows).templates.values()
    forms = ["question", "question", "inversion", "chain_of_thought"]
    assert [template.form for template in templates] == forms
    assert templates[0].needs == {"report", "title"}


def test_files_are_versions_and_exemplars_are_counted(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        [
            row("new {sky}"),
            row("old {sky}", file=OLD),
            row("newer {sky}", index=1),
            row("{ex_sky} {ex_answer} {sky}", group="INLINE_FS_PATTERNS"),
            row("{ex_sea} {sea}", dataset="sea", group="INLINE_FS_PATTERNS"),
        ],
    )
    assert (found.num_few_shot, found.unconverted) == (2, ())
    assert {
        key: [(template.name, template.family, template.version) for template in templates]
        for key, templates in found.templates.items()
    } == {
        ("sky", 2): [("pattern-0", "flan/sky", 2), ("pattern-1", "flan/sky", 2)],
        ("sky", 1): [("pattern-0", "flan/sky", 1)],
    }


UNCONVERTED = [
    (
        row("{sky}", file="other.py"),
        f"it must come from `{OLD}`, `{NEW}`, but `file` is `other.py`",
    ),
    (row("{sky}", group="MORE"), "the group `MORE` is not known"),
    (
        row("{sky}", index="0"),  # type: ignore[arg-type]
        "it needs the texts `dataset`, `input_pattern` and `target_pattern` and the number `index`",
    ),
    (
        row("{sky}", target_pattern=None),
        "it needs the texts `dataset`, `input_pattern` and `target_pattern` and the number `index`",
    ),
    (row("{sky} {true} {loop_} {none}"), "`none`, `true` cannot be the name of a field"),
    (
        row("{sky}? {not}"),
        "The prompt of template `flan/sky/pattern-0` must be valid jinja2, but: unexpected 'end of print "
        "statement' (line 1).",
    ),
    (
        row("{0}", "{answer}"),
        "`0` cannot be the name of a field",
    ),
]


@pytest.mark.parametrize(("bad", "reason"), UNCONVERTED)
def test_what_cannot_be_converted_is_said(tmp_path: Path, bad: dict[str, Any], reason: str) -> None:
    found = read(tmp_path, [row("{sky}", index=5), bad])
    place = f"{tmp_path / 'templates.jsonl.gz'}:2"
    assert found.unconverted == (Unconverted(place, reason),)
    ((template,),) = (kept for kept in found.templates.values() if kept)
    assert template.name == "pattern-5"
    with pytest.raises(DataError) as caught:
        load_family("flan/sky", folder=tmp_path)
    assert str(caught.value) == (
        f"Every pattern of `flan/sky` must become a template, but 1 of 2 cannot; the first, {place}: "
        f"{reason}. Mend the file."
    )


def test_an_index_stands_once(tmp_path: Path) -> None:
    found = read(tmp_path, [row("{sky}"), row("again {sky}")])
    place = f"{tmp_path / 'templates.jsonl.gz'}:2"
    assert found.unconverted == (Unconverted(place, "the index 0 stands there twice"),)


def test_families_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row("new {sky}"), row("old {sky}", file=OLD), row("{sea}", dataset="big:sea.gen")]
    folder = written(tmp_path / "flan_templates", rows)
    values = {"sky": "S", "answer": "A"}
    for place in (folder, tmp_path):
        (newest,) = load_family("flan/sky", folder=place)
        (older,) = load_family("flan/sky.v1", folder=place)
        assert (newest.fill(values).user, older.fill(values).user) == ("new S", "old S")
        assert load_family("flan/sky.v2", folder=place) == (newest,)
        assert len(load_family("flan/big:sea.gen", folder=place)) == 1
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    assert load_family("flan/sky") == (newest,)
    (other := tmp_path / "other").mkdir()
    assert load_family("flan/sky", folder=other) == (newest,)
    assert not any(name.startswith("flan") for name in families(folder))


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    written(tmp_path, [row("{sky}"), row("{sea}", dataset="sea"), row("{sky}", index=1, file=OLD)])
    file = tmp_path / "templates.jsonl.gz"
    for name, sentence in {
        "flan/skyy": (
            f"FLAN's file {file} has no templates for `skyy`. Did you mean `sky`? It has `sea`, `sky`."
        ),
        "flan/sky.v3": "`flan/sky` has no version 3, only `flan/sky.v1`, `flan/sky.v2`.",
        "flan/sea.v1": "`flan/sea` has no version 1, only `flan/sea.v2`.",
    }.items():
        with pytest.raises(DataError) as caught:
            load_family(name, folder=tmp_path)
        assert str(caught.value) == sentence


def test_a_file_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    end = (
        "Give its folder (`folder` of the template), or a data folder with "
        "flan_templates/templates.jsonl.gz (FLANMOE_DATA)."
    )
    start = "Templates of FLAN are read from a file templates.jsonl.gz, but it was looked for in"
    with pytest.raises(DataError) as caught:
        load_family("flan/sky")
    assert str(caught.value) == f"{start} no folder, for none is named. {end}"
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    with pytest.raises(DataError) as caught:
        flan_file(tmp_path / "mine")
    mine, data = tmp_path / "mine", tmp_path / "flan_templates"
    assert str(caught.value) == f"{start} {mine} and {mine / 'flan_templates'} and {data}. {end}"


def by_hand(pattern: str, values: dict[str, str], options: str) -> str:
    """FLAN's own way: the options' mark deleted or replaced, then one field after the other."""
    marks = [
        f"{space}{{{name}}}" for name in ("options_", "options_str") for space in ("\n\n", "\n", "")
    ]
    for mark in marks:
        pattern = pattern.replace(mark, mark[: mark.index("{")] + options if options else "")
    for name, value in values.items():
        pattern = pattern.replace(f"{{{name}}}", value)
    return pattern.strip()


def test_flans_file_is_converted_as_flan_fills_it_in(real_data_dir: Path) -> None:
    file = real_data_dir / "flan_templates" / "templates.jsonl.gz"
    if not file.is_file():
        pytest.skip("the data folder holds no flan_templates")
    lines = gzip.decompress(file.read_bytes()).decode("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    kept = [line for line in rows if line["group"] == "PATTERNS"]
    found = read_flan(file)
    assert found.unconverted == ()
    assert found.num_few_shot == len(rows) - len(kept) == 10
    assert len(kept) == sum(map(len, found.templates.values())) == 1598
    names = {
        name for line in kept for part in PARTS for name in re.findall(r"\{(\w+)\}", line[part])
    }
    values = {name: f"<{name}>" for name in names - {"options_", "options_str"}}
    ours = {**values, "rationale": "<cot>"}
    for line in kept:
        version = 1 if line["file"] == OLD else 2
        template = found.templates[line["dataset"], version][line["index"]]
        prompt, response = (line[part].replace("{chain_of_thought}", "{cot}") for part in PARTS)
        for options in (OPTIONS, ""):
            filled = template.fill({**ours, "options": options})
            assert filled.user == by_hand(prompt, values, options)
            assert filled.response == by_hand(response, values, options)
            assert "\n\n\n" not in filled.user or "\n\n\n" in prompt
        if template.form == "question":
            assert "{answer}" not in prompt


PARTS = ("input_pattern", "target_pattern")


def test_forms_in_flans_file(real_data_dir: Path) -> None:
    file = real_data_dir / "flan_templates" / "templates.jsonl.gz"
    if not file.is_file():
        pytest.skip("the data folder holds no flan_templates")
    forms = {
        key: Counter(t.form for t in found) for key, found in read_flan(file).templates.items()
    }
    assert forms["rte", 2] == {"question": 9, "inversion": 1}
    assert forms["aeslc", 1] == {"question": 8, "inversion": 2}
    assert forms["cot_gsm8k", 2] == {"chain_of_thought": 10}
    assert forms["synth_cot_common_gen", 2] == {"chain_of_thought": 10}
    assert forms["cot_stream_general_input_inversion", 2] == {"inversion": 18}
