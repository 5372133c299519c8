"""What the auxiliary loss gives the routers when two processes share a step, with both trainers.

    python routers_of_two.py FOLDER

`torchrun`'s environment is set by the test; the first process writes `out.pt`.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from test_transformers_trainer import auxiliary, our_gradient, their_gradient


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    found = {
        "theirs": auxiliary(their_gradient, folder, at_once=2),
        "ours": auxiliary(our_gradient, folder, at_once=2),
    }
    if torch.distributed.get_rank() == 0:
        torch.save(found, folder / "out.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
