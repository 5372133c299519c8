"""Language models for lm-eval that share work between requests."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flanmoe.core.errors import ConfigError
from flanmoe.evaluation.lm.capacity import drops_tokens
from flanmoe.evaluation.lm.decoder import DecoderLM as DecoderLM
from flanmoe.evaluation.lm.encoder_decoder import EncoderDecoderLM as EncoderDecoderLM
from flanmoe.evaluation.lm.harness import quiet_lm_eval as quiet_lm_eval
from flanmoe.evaluation.lm.journal import Journal as Journal
from flanmoe.evaluation.lm.language_model import LanguageModel as LanguageModel
from flanmoe.evaluation.lm.listening import Listener as Listener
from flanmoe.evaluation.lm.passes import Precision as Precision
from flanmoe.evaluation.lm.requests import Answer as Answer
from flanmoe.evaluation.lm.requests import Encoded as Encoded
from flanmoe.evaluation.lm.requests import encode_pair as encode_pair
from flanmoe.models.router_precision import run_routers_outside_autocast


def build_lm(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int | None = None,
    precision: Precision = "float32",
    journal: Journal | None = None,
    listener: Listener | None = None,
    capacity_drops: bool = False,
) -> LanguageModel:
    """Build the language model that lm-eval evaluates; nothing is loaded or downloaded.

    Puts `model` into evaluation mode and leaves it there.

    Args:
        model: a causal language model or an encoder-decoder, dense or sparse, where it is.
        tokenizer: its fast tokenizer; it is not changed.
        batch_size: most texts in one forward pass; None for as many as fit.
        precision: `bfloat16` computes matrix products under autocast; `float32` computes in the
            type of the weights. The softmax is float32 in either.
        journal: finished requests, to go on where an evaluation was stopped.
        listener: is told whose token each one of a pass is, to record what the model does with it.
        capacity_drops: let experts drop tokens above their capacity, as in training. Scores then depend on how
            texts are read.

    Raises:
        ConfigError: if `capacity_drops` is asked for and no expert has a capacity.
    """
    if capacity_drops and not drops_tokens(model):
        raise ConfigError(
            f"`capacity_drops` needs experts that take a limited number of tokens, but {type(model).__name__} "
            "drops none. Leave it out."
        )
    run_routers_outside_autocast(model)
    model.eval()
    build = EncoderDecoderLM if model.config.is_encoder_decoder else DecoderLM
    return build(
        model,
        tokenizer,
        batch_size=batch_size,
        precision=precision,
        # An empty journal is false.
        journal=Journal() if journal is None else journal,
        listener=listener,
        capacity_drops=capacity_drops,
    )
