"""What this machine is, and what it can do: memory, disk, and the rate of its matrix products, measured."""

import platform
import shutil
import time
from pathlib import Path

import psutil
import torch

from flanmoe.core.config import Config
from flanmoe.core.cores import usable_cores
from flanmoe.study.report_data import Hardware


class Machine(Config):
    """A machine as a plan sees it.

    Attributes:
        cores: cores that this process may use.
        memory_bytes: memory that is free for us now.
        disk_bytes: free space at the output folder.
        flops_per_second: measured rate of a matrix product of FFN shape.
    """

    cores: int
    memory_bytes: int
    disk_bytes: int
    flops_per_second: float


def this_machine(folder: Path, *, precision: str) -> Machine:
    """Measure this machine; `folder` is where output will go, `precision` as in `TuneConfig`."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    return Machine(
        cores=usable_cores(),
        memory_bytes=psutil.virtual_memory().available,
        disk_bytes=shutil.disk_usage(existing).free,
        flops_per_second=_matrix_rate(torch.bfloat16 if precision == "bfloat16" else torch.float32),
    )


def hardware() -> Hardware:
    """Describe this machine for a report."""
    return Hardware(
        cpu=_cpu_name(),
        num_cores=usable_cores(),
        memory_bytes=psutil.virtual_memory().total,
        accelerator=torch.cuda.get_device_name() if torch.cuda.is_available() else "",
    )


def _cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _matrix_rate(dtype: torch.dtype, *, seconds: float = 0.3) -> float:
    tokens, hidden, width = 1024, 576, 1536
    left, right = torch.randn(tokens, hidden, dtype=dtype), torch.randn(hidden, width, dtype=dtype)
    product = torch.empty(tokens, width, dtype=dtype)
    torch.mm(left, right, out=product)
    start = time.perf_counter()
    count = 0
    while time.perf_counter() - start < seconds:
        torch.mm(left, right, out=product)
        count += 1
    return 2.0 * tokens * hidden * width * count / (time.perf_counter() - start)
