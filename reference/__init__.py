"""The reference: every technique of fast LLM inference in NumPy, written to be read, and the oracle for every kernel.

``__all__`` lists the ops: arithmetic on arrays and scalars, nothing else. That list *is* the interface of a backend;
`fast` has every name in it. Structures (block tables, the scheduler, the decoder, ...) are imported from their own
modules and take a backend as an argument.
"""

from reference.attention.dense_attention import dense_attention
from reference.attention.flash_attention import flash_attention
from reference.attention.merge_states import merge_states
from reference.attention.paged_attention import paged_attention, split_paged_attention
from reference.fusion.embedding import embedding
from reference.fusion.linear_add import linear_add
from reference.fusion.rms_norm import add_rms_norm, rms_norm, rms_norm_linear
from reference.fusion.rotary import rotary, rotary_write_kv
from reference.fusion.swiglu import swiglu, swiglu_linear_add
from reference.kv_cache.fp8_cache import paged_attention_fp8, write_kv_fp8
from reference.kv_cache.int4_cache import paged_attention_int4, write_kv_int4
from reference.kv_cache.int8_cache import paged_attention_int8, write_kv_int8
from reference.kv_cache.kivi_cache import paged_attention_kivi, write_kv_kivi
from reference.kv_cache.lossless import decode_lossless, encode_lossless
from reference.kv_cache.slots import copy_blocks, gather_kv, swap_in, swap_out, write_kv
from reference.linear.linear import linear
from reference.linear.lora import lora
from reference.linear.quantized_linear import (
    linear_fp8,
    linear_fp8_fp8,
    linear_int4,
    linear_int8,
    linear_int8_int8,
    pack_weight,
    quantize_rows,
    unpack_weight,
)
from reference.linear.sparse_linear import sparse_linear
from reference.numerics.arrays import bitcast, empty, from_host, take_rows, to_host
from reference.numerics.low_precision import cast, round_to
from reference.numerics.philox import philox_4x32, random_gumbel, random_normal, random_uniform
from reference.sampling.beam_scores import beam_scores
from reference.sampling.lookup import lookup
from reference.sampling.sample import filter_logits, log_probs, penalize, sample
from reference.sampling.verify import verify

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
