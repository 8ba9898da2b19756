"""The fast backend: every op of `reference` again, as Triton kernels on torch tensors, same names and signatures.

What an op means is said in the reference; here each docstring says what one program owns, which bytes move, and what
the kernel cannot do. Tensors are float32, float16 or bfloat16 (float8 where the op is about it), sums are float32.
"""

from fast._triton.platform import INTERPRETING as INTERPRETING
from fast._triton.platform import unavailable as unavailable
from fast.attention.dense_attention import dense_attention
from fast.attention.flash_attention import flash_attention
from fast.attention.merge_states import merge_states
from fast.attention.paged_attention import paged_attention, split_paged_attention
from fast.fusion.embedding import embedding
from fast.fusion.linear_add import linear_add
from fast.fusion.rms_norm import add_rms_norm, rms_norm, rms_norm_linear
from fast.fusion.rotary import rotary, rotary_write_kv
from fast.fusion.swiglu import swiglu, swiglu_linear_add
from fast.kv_cache.fp8_cache import paged_attention_fp8, write_kv_fp8
from fast.kv_cache.int4_cache import paged_attention_int4, write_kv_int4
from fast.kv_cache.int8_cache import paged_attention_int8, write_kv_int8
from fast.kv_cache.kivi_cache import paged_attention_kivi, write_kv_kivi
from fast.kv_cache.lossless import decode_lossless, encode_lossless
from fast.kv_cache.slots import copy_blocks, gather_kv, swap_in, swap_out, write_kv
from fast.linear.linear import linear
from fast.linear.lora import lora
from fast.linear.quantized_linear import (
    linear_fp8,
    linear_fp8_fp8,
    linear_int4,
    linear_int8,
    linear_int8_int8,
    pack_weight,
    quantize_rows,
    unpack_weight,
)
from fast.linear.sparse_linear import sparse_linear
from fast.numerics.arrays import bitcast, empty, from_host, take_rows, to_host
from fast.numerics.low_precision import cast, round_to
from fast.numerics.philox import philox_4x32, random_gumbel, random_normal, random_uniform
from fast.sampling.beam_scores import beam_scores
from fast.sampling.lookup import lookup
from fast.sampling.sample import filter_logits, log_probs, penalize, sample
from fast.sampling.verify import verify

FLOAT_DTYPES = ("float32", "float16", "bfloat16")

__all__ = [
    "add_rms_norm",
    "beam_scores",
    "bitcast",
    "cast",
    "copy_blocks",
    "decode_lossless",
    "dense_attention",
    "embedding",
    "empty",
    "encode_lossless",
    "filter_logits",
    "flash_attention",
    "from_host",
    "gather_kv",
    "linear",
    "linear_add",
    "linear_fp8",
    "linear_fp8_fp8",
    "linear_int4",
    "linear_int8",
    "linear_int8_int8",
    "log_probs",
    "lookup",
    "lora",
    "merge_states",
    "pack_weight",
    "paged_attention",
    "paged_attention_fp8",
    "paged_attention_int4",
    "paged_attention_int8",
    "paged_attention_kivi",
    "penalize",
    "philox_4x32",
    "quantize_rows",
    "random_gumbel",
    "random_normal",
    "random_uniform",
    "rms_norm",
    "rms_norm_linear",
    "rotary",
    "rotary_write_kv",
    "round_to",
    "sample",
    "sparse_linear",
    "split_paged_attention",
    "swap_in",
    "swap_out",
    "swiglu",
    "swiglu_linear_add",
    "take_rows",
    "to_host",
    "unpack_weight",
    "verify",
    "write_kv",
    "write_kv_fp8",
    "write_kv_int4",
    "write_kv_int8",
    "write_kv_kivi",
]

from fast import invariant as invariant  # noqa: E402  (last, as it takes most of its ops from here)
