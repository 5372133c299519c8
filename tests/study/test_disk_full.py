"""A disk that fills while a study runs: one sentence, and nothing half written that looks complete."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

# In a mount namespace of its own: fills the disk as soon as the run has begun, down to so many KiB.
_SCRIPT = """
disk=$1 listing=$2 left=$3 file=$4
mount -t tmpfs -o size=64m none "$disk" || exit 99
(
    until [ -e "$disk/out/run.json" ]; do sleep 0.02; done
    free=$(df --output=avail -k "$disk" | tail -n 1)
    dd if=/dev/zero of="$disk/filler" bs=1024 count=$((free - left)) 2> "$listing"
) &
"$PYTHON" -m flanmoe run "$file" --out "$disk/out"
status=$?
find "$disk/out" > "$listing"
exit $status
"""


def _can_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    probe = ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


@pytest.fixture
def study_file(base: Path, sums_file: Path, tmp_path: Path) -> Path:
    """One arm that saves a model twice."""
    train = {"length": 64, "steps": 2, "rows_per_step": 2, "checkpoint_every_steps": 1}
    tune = {
        "data": {"tasks": [{"name": str(sums_file)}]},
        "packing": {"length": 64, "window": 8},
        "train": train,
    }
    stages = [
        {"stage": "upcycle", "num_experts": 4, "mode": "granular", "granularity": 2},
        {"stage": "tune", **tune},
    ]
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({"name": "tiny", "model": str(base), "stages": stages}))
    return path


@pytest.mark.slow
@pytest.mark.skipif(not _can_mount(), reason="needs a disk of its own: a namespace with a tmpfs")
@pytest.mark.parametrize("left", [0, 48, 400], ids="{}_KiB".format)
def test_a_full_disk_is_one_sentence_and_leaves_no_half_model(
    left: int, study_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHON", sys.executable)
    (tmp_path / "disk").mkdir()
    listing = tmp_path / "listing.txt"
    script = ["unshare", "--map-root-user", "--mount", "sh", "-c", _SCRIPT, "sh"]
    command = [*script, tmp_path / "disk", listing, left, study_file]
    result = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=200, check=False
    )
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    (sentence,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert sentence.startswith(f"Error: Writing {tmp_path / 'disk'}")
    assert "No space left on device" in sentence
    assert "Free some space or choose another folder with `--out`" in sentence
    written = [Path(line) for line in listing.read_text().splitlines()]
    assert any(path.name == "run.json" for path in written)
    assert not [path for path in written if path.name == ".partial"]
    for path in written:
        # A model folder is there with its weights, or not at all.
        if path.name == "model":
            assert path / "config.json" in written
            assert path / "model.safetensors" in written
