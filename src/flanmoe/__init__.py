"""flanmoe: dense or sparse language models into instruction-tuned Mixture-of-Experts, with cost and worth.

The names below are the public API. Each is imported when it is first asked for, so `import flanmoe` is
quick and loads neither torch nor transformers.
"""

import importlib
import importlib.metadata
from typing import Any

from flanmoe.core.names import nearest_name_hint

__version__ = importlib.metadata.version("flanmoe")

_PUBLIC = {
    "EvaluateStage": "flanmoe.stages.recipe",
    "Example": "flanmoe.data.example",
    "Ledger": "flanmoe.core.ledger",
    "Mixture": "flanmoe.data.mixture",
    "MixtureConfig": "flanmoe.data.mixture",
    "MoEBlock": "flanmoe.moe.block",
    "Packed": "flanmoe.data.example",
    "PackedStream": "flanmoe.data.stream",
    "PackingConfig": "flanmoe.data.packing",
    "Recipe": "flanmoe.stages.recipe",
    "Rendered": "flanmoe.data.example",
    "RouterLossConfig": "flanmoe.training.router_losses",
    "Routing": "flanmoe.moe.routing",
    "RoutingRecorder": "flanmoe.moe.recorder",
    "RunDir": "flanmoe.core.rundir",
    "SeedTree": "flanmoe.core.seeds",
    "SparseTrainer": "flanmoe.training.trainer",
    "Study": "flanmoe.study.study",
    "SuiteConfig": "flanmoe.evaluation.suites",
    "Task": "flanmoe.data.tasks",
    "TaskConfig": "flanmoe.data.tasks",
    "TuneConfig": "flanmoe.training.arguments",
    "TuneStage": "flanmoe.stages.recipe",
    "UpcycleConfig": "flanmoe.models.upcycle",
    "UpcycleStage": "flanmoe.stages.recipe",
    "balance_loss": "flanmoe.moe.losses",
    "compare": "flanmoe.evaluation.comparison",
    "count_flops": "flanmoe.models.flops",
    "count_parameters": "flanmoe.models.plan",
    "estimate_memory": "flanmoe.models.memory",
    "evaluate_suite": "flanmoe.evaluation.suites",
    "load_model": "flanmoe.models.loading",
    "load_study": "flanmoe.study.study",
    "load_tokenizer": "flanmoe.models.loading",
    "moe_blocks": "flanmoe.models.blocks",
    "tune": "flanmoe.training.tune",
    "upcycle": "flanmoe.models.upcycle",
    "z_loss": "flanmoe.moe.losses",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"flanmoe has no `{name}`.{nearest_name_hint(name, _PUBLIC)}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__
