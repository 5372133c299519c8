"""Is the auxiliary loss multiplied by the number of gradient-accumulation steps?

transformers' `Trainer` lets the model divide cross-entropy by the tokens of the whole step, and then adds
the micro-batches up. An auxiliary loss that the model adds as it is, is added up as well.
"""

from functools import partial

from flanmoe.stages.doctor.check import Check, Measured
from flanmoe.stages.doctor.one_step import one_step
from flanmoe.stages.doctor.trainers import MakeTrainer, plain_trainer, sft_trainer

MICRO_BATCHES = 4


def _ratio(make_trainer: MakeTrainer) -> Measured:
    whole = one_step(
        make_trainer, rows=MICRO_BATCHES, rows_per_batch=MICRO_BATCHES, micro_batches=1
    )
    cut = one_step(make_trainer, rows=MICRO_BATCHES, rows_per_batch=1, micro_batches=MICRO_BATCHES)
    detail = (
        f"The gradient of cross-entropy is {cut.head / whole.head:.2f} times that of one batch."
    )
    return Measured(cut.router / whole.router, detail)


def _check(name: str, library: str, trainer: str, make_trainer: MakeTrainer) -> Check:
    return Check(
        name=name,
        library=library,
        measures=(
            f"{trainer}: router gradient of the auxiliary loss, {MICRO_BATCHES} micro-batches over one batch"
        ),
        expected=1.0,
        meaning=(
            "The auxiliary loss grows with the number of gradient-accumulation steps: a coefficient of 0.001 "
            "acts like 0.008 with 8 steps. A recipe that is cut into other micro-batches trains another model."
        ),
        way_out=(
            "Train with flanmoe (`flanmoe run`), whose trainer owns the router losses; its scope `global` "
            "gives the same gradient however a step is cut. Otherwise divide `router_aux_loss_coef` by the "
            "number of steps."
        ),
        probe=partial(_ratio, make_trainer),
    )


CHECKS = (
    _check("accumulation", "transformers", "Trainer", plain_trainer),
    _check("accumulation_trl", "trl", "SFTTrainer", sft_trainer),
)
