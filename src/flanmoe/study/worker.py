"""The process of one job: `python -m flanmoe.study.worker STUDY_DIR ARM SEED DATA_DIR`.

Whatever goes wrong is written to `error.json` in the job's folder, one sentence and an exit status, for the
parent to raise again.
"""

import sys
import threading
import traceback
from pathlib import Path

from flanmoe.core import files
from flanmoe.core.errors import FlanmoeError, Interrupted
from flanmoe.study.executor import ERROR_FILE, Job, die_with_parent
from flanmoe.study.runner import run_arm


def main(arguments: list[str]) -> int:
    """Run one job and return the exit status."""
    study_dir, arm, seed, data_dir = arguments
    job = Job(Path(study_dir), arm, int(seed), Path(data_dir) if data_dir else None)
    threading.Thread(target=die_with_parent, daemon=True).start()
    try:
        run_arm(job)
    except KeyboardInterrupt:
        return _report(
            job, Interrupted(f"Arm `{arm}` was stopped; `--resume` goes on from where it was.")
        )
    except FlanmoeError as error:
        return _report(job, error)
    except Exception as error:
        traceback.print_exc(file=(job.folder / "traceback.txt").open("w"))
        sentence = (
            f"{type(error).__name__}: {error}. The details are in {job.folder / 'traceback.txt'}."
        )
        return _report(job, FlanmoeError(f"Arm `{arm}` failed with {sentence}"))
    return 0


def _report(job: Job, error: FlanmoeError) -> int:
    content = {"message": str(error), "exit_code": error.exit_code}
    files.write_json(job.folder / ERROR_FILE, content)
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
