"""Tune a sparse model in several processes, its weights and optimizer state spread over them.

    torchrun --standalone --nproc-per-node 2 examples/tune_in_several_processes.py MODEL TASK FOLDER

MODEL is a folder or a hub id of a sparse model (`flanmoe upcycle` writes one), TASK a task as recipes
name it, e.g. a `.jsonl` file. FOLDER, which all processes must see, gets metrics, checkpoints and the
tuned model. The same command again goes on from the newest checkpoint.
"""

import os
import sys
from pathlib import Path

import torch.distributed

import flanmoe
from flanmoe.models.loading import save_model
from flanmoe.training.checkpoints import latest_checkpoint

LENGTH = 256


def main(reference: str, task: str, folder: str) -> None:
    """Tune, and have the first process save the model."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    model, tokenizer = flanmoe.load_model(reference), flanmoe.load_tokenizer(reference)
    seeds, run = flanmoe.SeedTree(0), flanmoe.RunDir(Path(folder))
    mixture = flanmoe.Mixture.load(
        flanmoe.MixtureConfig.parse({"tasks": [task]}), seeds=seeds.child("data")
    )
    # Each process reads its own slice: row r of the whole stream goes to process r % world_size.
    stream = flanmoe.PackedStream(
        mixture,
        tokenizer,
        flanmoe.PackingConfig(length=LENGTH),
        seeds.child("data"),
        rank=rank,
        world_size=world_size,
    )
    config = flanmoe.TuneConfig(
        steps=10,
        rows_per_step=4 * world_size,
        length=LENGTH,
        checkpoint_every_steps=5,
        # Without recomputing, every process keeps a bfloat16 copy of all weights for the backward
        # pass, which sharding cannot help.
        gradient_checkpointing=True,
        sharding="fsdp",
    )
    result = flanmoe.tune(
        model,
        stream,
        config,
        run=run,
        seeds=seeds,
        flops_per_token=flanmoe.count_flops(model, context_length=LENGTH).training,
        resume=latest_checkpoint(run.path) is not None,
    )
    # Every process has the whole model again, on the CPU.
    if rank == 0:
        save_model(model, tokenizer, run.file("model"))
        print(f"loss of step {config.steps}: {result.final_loss:.3f} nats a token")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:4])
