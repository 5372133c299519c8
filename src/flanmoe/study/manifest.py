"""What a stage depends on beside its settings: the bytes of its data and model, the code, the versions."""

import hashlib
import importlib.metadata
import os
from collections.abc import Iterable
from pathlib import Path

from flanmoe.core.cache import fingerprint
from flanmoe.data.documents import DocumentsConfig, document_source
from flanmoe.data.flan2022 import flan2022_tasks
from flanmoe.data.mixture import MixtureConfig
from flanmoe.data.sources.base import Source, StorableSource
from flanmoe.data.sources.text_file import TextFile
from flanmoe.data.tasks import Task, load_tasks
from flanmoe.data.templates.flan import FLAN_PREFIX, flan_file
from flanmoe.evaluation.suites import load_evaluation
from flanmoe.stages.recipe import EvaluateStage, PretrainStage, Stage, TuneStage

CODE_VARIABLE = "FLANMOE_CODE_VERSION"
# What stages run; a change of the study's own code, the reports or the command line changes no stage.
_PACKAGES = (
    "core",
    "moe",
    "data",
    "models",
    "statistics",
    "pruning",
    "tuners",
    "training",
    "evaluation",
    "stages",
)
# lm-eval brings exemplars and tasks of its own.
_VERSIONED = ("torch", "transformers", "lm_eval")
_BLOCK_BYTES = 2**20


def code_version() -> str:
    """Return a hash of the sources that stages run; the variable FLANMOE_CODE_VERSION replaces it."""
    if named := os.environ.get(CODE_VARIABLE):
        return named
    package = Path(__file__).parents[1]
    digest = hashlib.blake2b(digest_size=12)
    for name in _PACKAGES:
        for path in sorted((package / name).rglob("*")):
            if path.is_file() and path.suffix != ".pyc":
                digest.update(f"{path.relative_to(package)}\0".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()


def stack_versions() -> dict[str, str]:
    """Return the versions of the packages that decide what comes out of a stage."""
    return {name: importlib.metadata.version(name) for name in _VERSIONED}


def model_files(reference: str | None) -> dict[str, str]:
    """Return the content hash of every file of a model's folder; nothing for a name."""
    if reference is None or not Path(reference).is_dir():
        return {}
    folder = Path(reference)
    return {
        f"model/{path.relative_to(folder)}": file_hash(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def stage_files(stage: Stage, data_dir: Path | None) -> dict[str, str]:
    """Return a content hash for each source of rows, and each file of templates or tasks, that a stage reads.

    Rows of a data set on the hub are known by the fingerprint that `datasets` gives them; what comes inside a
    package (exemplars, tasks of lm-eval) by the package's version, which `stack_versions` has.

    Raises:
        DataError: if something named is not there.
    """
    match stage:
        case TuneStage(data=data):
            return _tasks_hashed(_mixed(data, data_dir))
        case PretrainStage(documents=documents):
            return _documents_hashed(documents, data_dir)
        case EvaluateStage():
            own = Path(stage.lm_eval_tasks) if stage.lm_eval_tasks else None
            return {**_tasks_hashed(_evaluated(stage, data_dir)), **_folder_hashed(own)}
        case _:
            return {}


def _mixed(data: MixtureConfig, data_dir: Path | None) -> list[Task]:
    found = [] if data.flan2022 is None else flan2022_tasks(data.flan2022, data_dir).tasks
    return load_tasks([*data.tasks, *found, *data.without_overlap_of], data_dir=data_dir)


def _evaluated(stage: EvaluateStage, data_dir: Path | None) -> list[Task]:
    """Return what questions come from, and the worked examples before them."""
    loaded = load_evaluation(stage, data_dir=data_dir)
    shown = {
        task.config.exemplars.source.identity: task.config.exemplars.source
        for group in (loaded.prompted.groups if loaded.prompted else ())
        for task in group.tasks
        if task.config.exemplars is not None
    }
    return [*loaded.data_sets, *load_tasks(list(shown.values()), data_dir=data_dir)]


def _tasks_hashed(tasks: Iterable[Task]) -> dict[str, str]:
    found: dict[str, str] = {}
    for task in tasks:
        for number, source in enumerate(task.sources):
            if content := _source_hash(source):
                found[f"{task.name} (exemplars)" if number else task.name] = content
        template = task.config.template
        if template is not None and template.family.startswith(FLAN_PREFIX):
            file = flan_file(template.folder)
            found[f"templates/{file.name}"] = file_hash(file)
        elif template is not None:
            found |= _folder_hashed(template.folder)
    return found


def _documents_hashed(documents: DocumentsConfig, data_dir: Path | None) -> dict[str, str]:
    return {
        source.identity: content
        for source in documents.sources
        if (content := _source_hash(document_source(source, data_dir)))
    }


def _source_hash(source: Source) -> str | None:
    """Return the hash of a source's rows; None where they come inside a package."""
    if isinstance(source, TextFile):
        return file_hash(source.path)
    identity = source.identity() if isinstance(source, StorableSource) else None
    if identity is None:
        return None
    content = None if identity.file is None else file_hash(identity.file)
    return fingerprint([list(identity.content), content])


def _folder_hashed(folder: Path | None) -> dict[str, str]:
    if folder is None:
        return {}
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {f"{folder.name}/{path.relative_to(folder)}": file_hash(path) for path in paths}


def file_hash(path: Path) -> str:
    """Return a short hash of a file's bytes."""
    digest = hashlib.blake2b(digest_size=12)
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
