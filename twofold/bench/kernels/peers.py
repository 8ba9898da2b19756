"""The peers that are not always there, and how each is called. How they get onto a machine: `benchmarks/README.md`."""

import importlib
import importlib.util
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch


class Missing(Exception):
    """A peer that is not on this machine."""


@cache
def flashinfer() -> Any:
    """The FlashInfer module."""
    try:
        return importlib.import_module("flashinfer")
    except ImportError as error:
        raise Missing(f"flashinfer is not installed ({error})") from None


@cache
def fa3() -> Any:
    """FlashAttention-3's forward op, out of the library that vLLM ships: it loads without the rest of vLLM."""
    path = os.environ.get("TWOFOLD_FA3_LIBRARY") or _in_vllm("vllm_flash_attn/_vllm_fa3_C.abi3.so")
    if path is None or not Path(path).exists():
        raise Missing("no FlashAttention-3 library (TWOFOLD_FA3_LIBRARY names one)")
    torch.ops.load_library(str(path))
    return torch.ops._vllm_fa3_C.fwd


def _in_vllm(file: str) -> Path | None:
    spec = importlib.util.find_spec("vllm")  # finds, does not import
    folders = spec.submodule_search_locations if spec else None
    return Path(folders[0]) / file if folders else None


def fa3_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    max_q: int,
    max_k: int,
    cu_seqlens_k: torch.Tensor | None = None,
    seq_lens: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    scales: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Causal attention over packed or paged keys; ``scales`` of q, k and v where they are float8."""
    q_scale, k_scale, v_scale = scales or (None, None, None)
    none = None
    return fa3()(
        q, k, v, none, none, none, none,  # new keys and values, q_v, out
        cu_seqlens_q, cu_seqlens_k, none, none, seq_lens, max_q, max_k, block_table,
        none, none, none, none, none,  # batch index, left padding, rotary tables and lengths
        q_scale, k_scale, v_scale, q.shape[-1] ** -0.5,
        True, -1, -1, 0.0,  # causal, no window, no cap
        True, none, 0, none, 0, none, 1, 0, none,  # interleaved rotary, plan, splits, packing, margin, context parallel
    )[0]  # fmt: skip
