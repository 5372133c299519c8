"""Which models of a study stay: those that an arm ends with, and those that a stage has yet to take."""

import shutil

from flanmoe.core.console import say
from flanmoe.study.board import Board
from flanmoe.study.nodes import MODEL_FOLDER, has_model, model_marker


def forget_intermediate_models(board: Board) -> None:
    """Remove the models that no arm ends with and that all stages which take them have taken.

    A stage that failed, or waits behind one, has not taken its model: it stays for `--resume`.
    """
    graph = board.graph
    kept = {final.key for branch in graph.branches if (final := graph.final(branch))}
    for key, node in graph.nodes.items():
        taken = all(child.key in board.results for child in graph.children(key))
        folder = board.folder(key)
        if key in kept or key not in board.results or not taken or not has_model(folder):
            continue
        # Its marker first: a kill in between leaves nothing that looks like a model.
        model_marker(folder).unlink(missing_ok=True)
        shutil.rmtree(folder / MODEL_FOLDER, ignore_errors=True)
        say(f"  removed the intermediate model of `{node.label}`")
