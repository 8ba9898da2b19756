"""A step's inputs as arrays of agreed names and shapes; and a step, which may be recorded once, to be replayed.

A recorded step is a CUDA graph: its kernels, their sizes and the addresses they read are fixed. So steps come in
*buckets*. A step is recorded for round numbers of tokens, sequences, logit rows and blocks a sequence, and a batch is
padded to the next of them: with tokens whose slot is -1, in sequences of a token each that have no keys (the last of
them has the rest). The batch as the scheduler made it has no padding, and no kernel's result for a real token depends
on it.

A sequence's block table comes anew with every step: a quarter of a byte a token, where attention reads some ten
thousand of its keys and values. So nothing on the device has to be kept in step with the host's tables.
"""

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fast._checks import checking_values
from fast._runner.staging import Layout, host_buffer
from reference.batching.packing import Batch, SamplingBatch


class StepShape(NamedTuple):
    """What decides the shapes of a step's arrays."""

    num_tokens: int
    num_seqs: int
    num_rows: int  # of logits
    num_blocks: int  # a sequence's, at most
    has_window: bool  # the cache has a second pool
    has_adapters: bool
    keeps_logits: bool  # more is asked of them than a draw from each row

    @classmethod
    def of(cls, batch: Batch) -> "StepShape":
        """As it is: nothing is padded."""
        has_window, has_adapters = len(batch.block_tables) > 1, batch.adapter_ids is not None
        sizes = len(batch.seq_lens), len(batch.logit_rows), batch.block_tables[0].shape[1]
        return cls(batch.num_tokens, *sizes, has_window, has_adapters, not only_draws(batch.sampling))

    def padded(self) -> "StepShape":
        """The bucket that it falls into.

        Example:
            >>> StepShape(5, 5, 5, 9, False, False, False).padded()[:4]
            (8, 8, 8, 64)
            >>> StepShape(70, 5, 4, 65, False, False, False).padded()[:4]
            (128, 8, 8, 128)
            >>> StepShape(5000, 5, 4, 65, False, False, False).padded()[:4]
            (5120, 8, 8, 128)
        """
        if self.num_tokens == self.num_seqs == self.num_rows:
            num_seqs = num_tokens = num_rows = bucket(self.num_seqs)
        else:
            num_seqs = power_of_2(self.num_seqs + 1)  # one at least for the tokens that pad
            num_tokens = max(FEWEST_TOKENS, many_tokens(self.num_tokens), num_seqs)
            num_rows = max(num_seqs, bucket(self.num_rows))
        return self._replace(
            num_tokens=num_tokens,
            num_seqs=num_seqs,
            num_rows=num_rows,
            num_blocks=max(FEWEST_BLOCKS, power_of_2(self.num_blocks)),
        )

    def layout(self) -> Layout:
        """Of the arrays' buffer."""
        tokens, rows = (self.num_tokens,), (self.num_rows,)
        arrays: dict[str, tuple[Any, tuple[int, ...]]] = {
            "token_ids": (np.int32, tokens),
            "token_sources": (np.int64, tokens),
            "positions": (np.int32, tokens),
            "cu_seqlens_q": (np.int32, (self.num_seqs + 1,)),
            "seq_lens": (np.int32, (self.num_seqs,)),
            "logit_rows": (np.int32, rows),
            "temperature": (np.float32, rows),
            "top_k": (np.int32, rows),
            "top_p": (np.float32, rows),
            "min_p": (np.float32, rows),
            "seeds": (np.int64, rows),
            "draw_positions": (np.int32, rows),
            "sample_indices": (np.int32, rows),
        }
        for prefix in ("", "window_")[: 1 + self.has_window]:
            arrays[f"{prefix}slot_mapping"] = (np.int64, tokens)
            arrays[f"{prefix}block_table"] = (np.int32, (self.num_seqs, self.num_blocks))
        if self.has_adapters:
            arrays["adapter_ids"] = (np.int32, tokens)
        return Layout(arrays)


def only_draws(sampling: SamplingBatch) -> bool:
    """Whether a token of each row, and nothing else, is wanted."""
    more = (sampling.penalties, sampling.logprob_rows, sampling.cu_drafts, sampling.cu_beams)
    return all(what is None for what in more) and not sampling.for_drafts


FEWEST_TOKENS, FEWEST_BLOCKS = 16, 64
FINE, COARSE = 32, 16  # up to FINE sequences buckets are powers of 2, and then multiples of COARSE
LONG = 512  # tokens of a mixed step from which on padding costs more than buckets do: eight between two powers of 2


def power_of_2(n: int) -> int:
    """The smallest that is at least ``n``; 1 for 0."""
    return 1 << max(n - 1, 0).bit_length()


def bucket(n: int) -> int:
    """The smallest bucket that holds ``n``.

    Example:
        >>> [bucket(n) for n in (0, 1, 3, 33, 60, 65)]
        [1, 1, 4, 48, 64, 80]
    """
    return power_of_2(n) if n <= FINE else -(-n // COARSE) * COARSE


def many_tokens(n: int) -> int:
    """The smallest bucket of a mixed step that holds ``n`` tokens.

    Example:
        >>> [many_tokens(n) for n in (30, 300, 513, 1025, 8192)]
        [32, 512, 576, 1152, 8192]
    """
    if n <= LONG:
        return power_of_2(n)
    coarse = power_of_2(n) // 16
    return -(-n // coarse) * coarse


def fill(arrays: Mapping[str, np.ndarray], batch: Batch) -> None:
    """Write a batch into a step's arrays, and what pads it behind."""
    sampling = batch.sampling
    given = {
        "token_ids": batch.token_ids,
        "token_sources": batch.token_sources,
        "positions": batch.positions,
        "cu_seqlens_q": batch.cu_seqlens_q,
        "seq_lens": batch.seq_lens,
        "logit_rows": batch.logit_rows,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "seeds": sampling.seeds,
        "draw_positions": sampling.positions,
        "sample_indices": sampling.sample_indices,
        "adapter_ids": batch.adapter_ids,
    }
    for prefix, slots, table in zip(("", "window_"), batch.slot_mappings, batch.block_tables):
        given |= {f"{prefix}slot_mapping": slots, f"{prefix}block_table": table}
    for name, array in arrays.items():
        values = given[name]
        assert values is not None
        if array.ndim == 2:
            array[: values.shape[0], : values.shape[1]] = values  # beyond: nobody looks there
        else:
            array[: len(values)] = values
            array[len(values) :] = PADDING.get(name, 0)
    offsets, first = arrays["cu_seqlens_q"], len(batch.seq_lens)
    offsets[first:] = np.minimum(
        np.arange(batch.num_tokens, batch.num_tokens + len(offsets) - first), arrays["token_ids"].size
    )
    offsets[-1] = arrays["token_ids"].size


PADDING = {"token_sources": -1, "slot_mapping": -1, "window_slot_mapping": -1, "adapter_ids": -1, "top_p": 1}

Compute = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@dataclass
class Upload:
    """A step's arrays on the host, and the same on the device after ``send``."""

    shape: StepShape
    device: torch.device

    def __post_init__(self) -> None:
        self.layout = self.shape.layout()
        self.on_device = torch.zeros(self.layout.num_bytes, dtype=torch.uint8, device=self.device)
        self.tensors = self.layout.tensors(self.on_device)

    def packed(self, batch: Batch) -> Tensor:
        """A batch's arrays on the host, as `send` wants them."""
        host = host_buffer(self.layout.num_bytes, self.device)
        fill(self.layout.arrays(host), batch)
        return host

    def send(self, packed: Tensor) -> None:
        """Queue the copy of a batch's arrays."""
        self.on_device.copy_(packed, non_blocking=True)

    def send_padding(self) -> None:
        """Arrays of a step that computes nothing for anybody."""
        for name, value in PADDING.items():
            if name in self.tensors:
                self.tensors[name].fill_(value)
        offsets = torch.arange(self.shape.num_seqs + 1, dtype=torch.int32)
        self.tensors["cu_seqlens_q"].copy_(offsets.clamp(max=self.shape.num_tokens))


class Step:
    """A step of some shape over buffers of its own.

    Args:
        compute: From the step's tensors to its results.

    Attributes:
        results: What ``compute`` gave, overwritten by the next step of this shape.
    """

    def __init__(self, shape: StepShape, compute: Compute, device: torch.device):
        self.upload, self._compute, self._graph = Upload(shape, device), compute, None

    def record(self, pool: Any) -> None:
        """From now on replay what is computed here, over padding alone, which touches nobody's blocks.

        ``compute`` is called twice: to compile kernels and to allocate what they keep, then to record them. Without a
        GPU nothing is recorded, and it is called for every step; so too while values are checked
        (``TWOFOLD_CHECK=1``), for which the host has to read them.

        Args:
            pool: The memory that recorded steps share, since only one runs at a time; None without a GPU.
        """
        if self.upload.device.type != "cuda" or checking_values():
            return
        self.upload.send_padding()
        self._compute(self.upload.tensors)
        graph = torch.cuda.CUDAGraph()
        now = torch.cuda.stream(torch.cuda.current_stream())  # a capture that fails leaves another one behind
        with now, no_garbage_collection(), torch.cuda.graph(graph, pool=pool):
            self.results = self._compute(self.upload.tensors)
        self._graph = graph

    def run(self, packed: Tensor) -> dict[str, Tensor]:
        """Queue the step for a batch's arrays."""
        self.upload.send(packed)
        if self._graph is None:
            self.results = self._compute(self.upload.tensors)
        else:
            self._graph.replay()
        return self.results


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """While a step is recorded: to destroy another graph, of an engine that nobody holds any more, would end it."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
