"""Speculation by the words of a user: ``ngram:K``, or a draft model."""

from dataclasses import replace

from reference.batching.config import EngineConfig
from reference.batching.drafting import ModelDrafter, NgramDrafter
from reference.batching.engine import Drafter
from reference.batching.runner import ModelRunner
from reference.model.decoder import Decoder
from twofold.checkpoints import load_checkpoint
from twofold.errors import TwofoldError
from twofold.sizing import pool_sizes

DEFAULT_DRAFTS = 4


def make_drafter(how: str, decoder: Decoder, config: EngineConfig) -> Drafter:
    """The drafter that ``how`` asks for.

    Args:
        how: "ngram:K" drafts up to K tokens by look-up in the text so far; otherwise a model, as ``load_checkpoint``
            takes it, with ":K" after it or not.
        decoder: Of the model that verifies.
        config: Of its engine; the draft model's cache has as many sequences and tokens.

    Raises:
        TwofoldError: If K is no number of tokens, or the draft model has another vocabulary.
    """
    name, colon, count = how.rpartition(":")
    if not (colon and (name == "ngram" or count.isdecimal())):
        name, count = how, str(DEFAULT_DRAFTS)
    if not count.isdecimal() or int(count) < 1:
        raise TwofoldError(f"--speculate {how}: expected ngram:K or MODEL:K with K tokens, at least 1")
    if name == "ngram":
        return NgramDrafter(int(count), backend=decoder.backend, device=decoder.device)
    checkpoint = load_checkpoint(name)
    if checkpoint.config.vocab_size != decoder.config.vocab_size:
        raise TwofoldError(
            f"--speculate {name}: a draft model must have the same vocabulary: it has {checkpoint.config.vocab_size} "
            f"tokens, the model {decoder.config.vocab_size}"
        )
    sizes = pool_sizes(
        checkpoint.config,
        "auto",
        decoder.dtype,
        block_size=config.block_size,
        num_blocks=None,
        max_model_len=min(config.max_model_len, checkpoint.config.max_position_embeddings),
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        lookahead=0,
    )
    draft = Decoder(
        checkpoint.config,
        checkpoint.tensors(),
        backend=decoder.backend,
        dtype=decoder.dtype,
        device=decoder.device,
        max_positions=sizes.max_model_len,
    )
    cache = sizes.cache(checkpoint.config, backend=decoder.backend, device=decoder.device)
    settings = replace(
        sizes.engine_config(checkpoint.config),
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
    )
    return ModelDrafter(
        ModelRunner(draft, cache), settings, num_drafts=int(count), vocab_size=decoder.config.vocab_size
    )
