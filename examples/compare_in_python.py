"""A dense-against-sparse study from Python, without the command line: the file, the run, the numbers.

python examples/compare_in_python.py STUDY.yaml FOLDER
"""

import sys
from pathlib import Path

from flanmoe.study.collect import collect
from flanmoe.study.executors.local import LocalExecutor
from flanmoe.study.report import write_report
from flanmoe.study.runner import run_study
from flanmoe.study.study_file import load_study


def main(file: str, folder: str) -> None:
    """Run a study and print every paired difference with its interval."""
    study = load_study(Path(file))
    run = run_study(
        study, Path(folder), executor=LocalExecutor(), data_dir=None, resume=Path(folder).exists()
    )
    data = collect(study, run)
    for item in data.comparisons:
        print(
            f"{item.subject} minus {item.reference}, {item.metric}: {item.mean:+.4f} "
            f"({item.low:+.4f} to {item.high:+.4f}, n = {item.num_examples}): {item.verdict}"
        )
    print(f"report: {write_report(data, run.path).html}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
