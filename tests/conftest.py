"""Shared set-up of the tests: offline, one seedable place for temporary folders, shapes checked.

The import hook wraps every annotated function of the tensor packages in a beartype and jaxtyping check, so
each test also checks the shapes in the signatures it runs through. Compile tests need the plain functions:
they run in a process of their own with `FLANMOE_CHECK_SHAPES=0`.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny models gain nothing from threads; on a busy machine they wait for each other most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

if os.environ.get("FLANMOE_CHECK_SHAPES", "1") == "1":
    from jaxtyping import install_import_hook

    install_import_hook(["flanmoe.moe", "flanmoe.models", "flanmoe.data"], "beartype.beartype")

from hypothesis import settings

# Deadlines measure the machine, not the code; speed lives in benchmarks/.
settings.register_profile("flanmoe", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("flanmoe")
