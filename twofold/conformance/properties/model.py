"""What a decoder must do on any backend: the same function however its tokens are cut, batched, placed and stored."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np

from reference.kv_cache.cache import CacheView, KVCache
from reference.kv_cache.formats import KVFormat, resolve_format
from reference.linear.weight import Weight, weight_format
from reference.model.config import ModelConfig
from reference.model.decoder import AdapterBank, Decoder
from reference.model.gqa_conversion import convert_to_gqa

# Of a row's largest logit, float32. Models this small lose 5e-7 to 1e-5, as their softmaxes are more or less sharp;
# whatever is left out or mixed up shows at 1e-2.
LOGIT_TOLERANCE = 1e-4

Backend = ModuleType | Any
Tensors = Mapping[str, np.ndarray]
Steps = Sequence[Sequence[int]]  # for each step, how many tokens of each sequence it computes


def whole(sequences: Sequence[Sequence[int]]) -> Steps:
    """Everything in one step."""
    return [[len(tokens) for tokens in sequences]]


def paged_logits(
    decoder: Decoder,
    sequences: Sequence[Sequence[int]],
    steps: Steps,
    *,
    block_size: int = 4,
    seed: int = 0,
    kv_format: KVFormat | str = "auto",
    adapters: AdapterBank | None = None,
    adapter_of: Sequence[int] | None = None,
    last_only: bool = False,
) -> list[np.ndarray]:
    """Run known sequences through a decoder, step by step, and return the logits of each sequence's tokens.

    The cache's blocks are dealt out in a shuffled order, from a pool that is full of NaN.

    Args:
        steps: How many tokens of each sequence each step computes; together, all of them.
        seed: Of the order of blocks.
        adapter_of: An adapter's number for each sequence; -1 for none.
        last_only: Ask for the logits of each step's last tokens only, as an engine does.
    """
    config, backend = decoder.config, decoder.backend
    blocks_per_seq = [-(-len(tokens) // block_size) for tokens in sequences]
    num_blocks = sum(blocks_per_seq) + 2
    order = np.random.default_rng(seed).permutation(num_blocks)
    cache = KVCache(
        kv_format,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        block_size=block_size,
        num_blocks=num_blocks,
        num_window_blocks=0 if resolve_format(kv_format, decoder.dtype).window is None else num_blocks,
        dtype=decoder.dtype,
        backend=backend,
    )
    for pool, size in enumerate(cache.block_bytes):
        cache.swap_in(np.full((num_blocks, size), 0xFF, np.uint8), range(num_blocks), pool=pool)
    block_table = np.full((len(sequences), max(blocks_per_seq, default=0)), -1, np.int32)
    for row, count, start in zip(block_table, blocks_per_seq, np.cumsum([0, *blocks_per_seq])):
        row[:count] = order[start : start + count]

    place = backend.from_host
    done = [0] * len(sequences)
    logits: list[list[np.ndarray]] = [[] for _ in sequences]
    for counts in steps:
        spans = [range(start, start + count) for start, count in zip(done, counts)]
        tokens = [sequences[s][p] for s, span in enumerate(spans) for p in span]
        slots = [
            block_table[s, p // block_size] * block_size + p % block_size for s, span in enumerate(spans) for p in span
        ]
        done = [span.stop for span in spans]
        ends = np.cumsum([0, *counts]).astype(np.int32)
        view = CacheView(
            cu_seqlens_q=place(ends),
            seq_lens=place(np.array(done, np.int32)),
            block_table=place(block_table),
            slot_mapping=place(np.array(slots, np.int64)),
            window_block_table=place(block_table),  # blocks of the window's pool have their own ids; these are as good
            window_slot_mapping=place(np.array(slots, np.int64)),
        )
        rows = (
            [int(end) - 1 for end, count in zip(ends[1:], counts) if count] if last_only else list(range(len(tokens)))
        )
        ids = None if adapter_of is None else np.repeat(np.array(adapter_of, np.int32), counts)
        got = decoder.forward(
            place(np.array(tokens, np.int64)),
            place(np.array([p for span in spans for p in span], np.int64)),
            view,
            cache,
            logit_rows=place(np.array(rows, np.int64)) if last_only else None,
            adapters=adapters,
            adapter_ids=None if ids is None else place(ids),
        )
        got = backend.to_host(got)
        assert got.dtype == np.float32, f"logits: expected float32, got {got.dtype}"
        assert got.shape == (len(rows), config.vocab_size), f"logits: {len(rows)} rows asked for, got {got.shape}"
        for s in range(len(sequences)):
            mine = [i for i, row in enumerate(rows) if ends[s] <= row < ends[s + 1]]
            logits[s].append(got[mine])
    assert done == [len(tokens) for tokens in sequences], "steps must compute every token once"
    return [np.concatenate(parts) for parts in logits]


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    """The largest error of a logit, relative to the largest logit of its row; the worst row's. NaN is the worst."""
    assert got.shape == expected.shape, f"logits: expected shape {expected.shape}, got {got.shape}"
    if got.size == 0:
        return 0.0
    error = np.abs(got.astype(np.float64) - expected).max(axis=-1) / np.abs(expected).max(axis=-1)
    return float(np.nan_to_num(error, nan=np.inf).max())


def assert_same_logits(
    got: Sequence[np.ndarray], expected: Sequence[np.ndarray], what: str, tolerance: float = LOGIT_TOLERANCE
) -> None:
    for s, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
        error = relative_error(mine, theirs)
        assert error <= tolerance, f"{what}: sequence {s}: relative error of logits {error:.2g} > {tolerance:g}"


# ---- laws -------------------------------------------------------------------------------------------------------


def steps_do_not_matter(
    backend: Backend, model: tuple[ModelConfig, Tensors], sequences: list[list[int]], steps: Steps, **options: Any
) -> None:
    """Cut into chunks, batched with others, in blocks of any size and order: a sequence's logits are those that it has
    alone, in one step."""
    decoder = Decoder(*model, backend=backend)
    alone = [paged_logits(decoder, [tokens], [[len(tokens)]], block_size=16)[0] for tokens in sequences]
    assert_same_logits(paged_logits(decoder, sequences, steps, **options), alone, f"steps {steps}, {options}")


def only_the_rows_asked_for(
    backend: Backend, model: tuple[ModelConfig, Tensors], sequences: list[list[int]], steps: Steps
) -> None:
    """Asked for the last row of each chunk, a step gives those of all its rows, and the cache is as it was."""
    decoder = Decoder(*model, backend=backend)
    everything = paged_logits(decoder, sequences, steps)
    ends = [np.cumsum([count for count in counts if count]) - 1 for counts in zip(*steps)]
    got = paged_logits(decoder, sequences, steps, last_only=True)
    assert_same_logits(got, [rows[last] for rows, last in zip(everything, ends)], "last rows")


def interleaved_is_half_split_of_reordered_rows(
    backend: Backend, model: tuple[ModelConfig, Tensors], tokens: list[int]
) -> None:
    """Rows of q and k stored for interleaved pairs, and the config that says so, are the same model. (A GGUF of the
    Llama family stores them so.)"""
    config, tensors = model
    order = np.arange(config.head_dim).reshape(2, -1).T.ravel()  # 0 half 1 half+1 ...
    reordered = dict(tensors)
    for name, array in tensors.items():
        if any(part in name for part in (".q_proj.", ".k_proj.", ".q_norm.", ".k_norm.")):
            heads = array.reshape(-1, config.head_dim, *array.shape[1:])
            reordered[name] = heads[:, order].reshape(array.shape)
    stored = replace(config, rope_interleaved=True), reordered
    got, expected = (
        paged_logits(Decoder(*kept, backend=backend), [tokens], whole([tokens])) for kept in (stored, model)
    )
    assert_same_logits(got, expected, "interleaved")


def alike_heads_pool_to_the_same_function(
    backend: Backend, model: tuple[ModelConfig, Tensors], num_kv_heads: int, tokens: list[int]
) -> None:
    """Where the KV heads of a group are alike, the converted model is the same function."""
    config, tensors = model
    group = config.num_kv_heads // num_kv_heads
    alike = dict(tensors)
    for name, array in tensors.items():
        if ".k_proj." in name or ".v_proj." in name:
            heads = array.reshape(num_kv_heads, group, -1)
            alike[name] = np.repeat(heads[:, :1], group, axis=1).reshape(array.shape)
    converted = convert_to_gqa(config, alike, num_kv_heads)
    assert converted[0].num_kv_heads == num_kv_heads
    shapes = {name: array.shape for name, array in converted[1].items()}
    assert shapes == converted[0].expected_tensors(), "the converted checkpoint is not what its config says"
    got, expected = (
        paged_logits(Decoder(*kept, backend=backend), [tokens], whole([tokens]))
        for kept in (converted, (config, alike))
    )
    assert_same_logits(got, expected, f"{config.num_kv_heads} to {num_kv_heads} KV heads")


def rounded_weights_are_their_values(
    backend: Backend, model: tuple[ModelConfig, Tensors], format: str, tokens: list[int]
) -> None:
    """A decoder whose matrices are kept in a narrow format is the float32 decoder of the values they stand for. The
    embedding and the head are rounded to a float format only."""
    config, tensors = model
    rounded = ("_proj.weight", "embed_tokens.weight", "lm_head.weight")[: 3 if weight_format(format).is_float else 1]
    values = {
        name: Weight.from_float(array, format=format).dequantize() if name.endswith(rounded) else array
        for name, array in tensors.items()
    }
    got = paged_logits(Decoder(config, tensors, backend=backend, weight_format=format), [tokens], whole([tokens]))
    expected = paged_logits(Decoder(config, values, backend=backend), [tokens], whole([tokens]))
    assert_same_logits(got, expected, format)


def kept_weights_are_their_values(
    backend: Backend, model: tuple[ModelConfig, Tensors], formats: Mapping[str, str], tokens: list[int]
) -> None:
    """Tensors that come as `Weight`s, in whatever mixture of formats, are used as they are: "as-is" gives the logits of
    the values they stand for.

    Args:
        formats: The format of each tensor whose name ends so.
    """
    config, tensors = model
    kept: dict[str, Any] = dict(tensors)
    values = dict(tensors)
    for name, array in tensors.items():
        format = next((format for end, format in formats.items() if name.endswith(end)), None)
        if format is not None:
            kept[name] = Weight.from_float(array, format=format)
            values[name] = kept[name].dequantize()
    decoder = Decoder(config, kept, backend=backend, weight_format="as-is")
    got = paged_logits(decoder, [tokens], whole([tokens]))
    expected = paged_logits(Decoder(config, values, backend=backend), [tokens], whole([tokens]))
    assert_same_logits(got, expected, str(formats))


# ---- adapters ---------------------------------------------------------------------------------------------------


def merged(config: ModelConfig, tensors: Tensors, adapter: Mapping[str, np.ndarray], scaling: float) -> dict[str, Any]:
    """The tensors of a model with an adapter added to its weights: W + scaling * B A."""
    together = dict(tensors)
    for name in adapter:
        if name.endswith("lora_A.weight"):
            layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            delta = adapter[name.replace("lora_A", "lora_B")].astype(np.float64) @ adapter[name]
            weight = tensors[f"{layer}.weight"]
            together[f"{layer}.weight"] = (weight + scaling * delta).astype(weight.dtype)
    return together


def adapters_are_merged_weights(
    backend: Backend,
    model: tuple[ModelConfig, Tensors],
    adapters: Sequence[tuple[dict[str, np.ndarray], dict[str, Any]]],
    sequences: list[list[int]],
    adapter_of: list[int],
    steps: Steps,
) -> None:
    """Each sequence of a batch has the logits of the model into which its own adapter was merged; without an adapter,
    of the base."""
    config, tensors = model
    decoder = Decoder(config, tensors, backend=backend)
    bank = AdapterBank(config, backend=backend)
    variants = [dict(tensors)]
    for i, (adapter, adapter_config) in enumerate(adapters):
        assert bank.add(f"adapter {i}", adapter, adapter_config) == i
        rank = next(len(a) for name, a in adapter.items() if "lora_A" in name)
        divisor = np.sqrt(rank) if adapter_config.get("use_rslora") else rank
        variants.append(merged(config, tensors, adapter, adapter_config["lora_alpha"] / divisor))
    expected = [
        paged_logits(Decoder(config, variants[which + 1], backend=backend), [tokens], whole([tokens]))[0]
        for tokens, which in zip(sequences, adapter_of)
    ]
    given = {"adapters": bank, "adapter_of": adapter_of}
    assert_same_logits(paged_logits(decoder, sequences, steps, **given), expected, f"adapters {adapter_of}")
    last = paged_logits(decoder, sequences, whole(sequences), last_only=True, **given)
    assert_same_logits(last, [rows[-1:] for rows in expected], f"last rows with adapters {adapter_of}")
