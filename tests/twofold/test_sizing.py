"""What fits into memory: sizes told before anything is loaded, and a pool that takes what is left."""

import json
import re
from functools import partial

import pytest
import torch

import fast
import twofold.llm
from fast.runner import GraphRunner
from reference.batching.runner import ModelRunner
from reference.linear.weight import WEIGHT_FORMATS
from reference.model.decoder import Decoder
from twofold import LLM, SamplingParams
from twofold.backends import Execution, execution
from twofold.checkpoints import RandomTensors
from twofold.checkpoints.shapes import SHAPES
from twofold.conformance import plain_torch
from twofold.conformance.strategies.model import random_model, small_shape
from twofold.errors import TwofoldError
from twofold.sizing import pool_sizes, require_room, weight_bytes

CONFIG, _ = random_model("qwen3", hidden_size=64, intermediate_size=128, head_dim=32, num_heads=2, num_kv_heads=2)
SMALL = small_shape("meta-llama/Llama-3.1-8B", max_position_embeddings=256)


def sizes(num_blocks=8, kv_cache_dtype="auto", max_model_len=None):
    return pool_sizes(
        CONFIG,
        kv_cache_dtype,
        "float32",
        block_size=16,
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        lookahead=0,
    )


@pytest.mark.parametrize("format", ["auto", *WEIGHT_FORMATS])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_take_what_was_said_they_would(format, dtype):
    name = "int4-64" if format == "int4" else format
    tensors = RandomTensors(CONFIG, backend=plain_torch, dtype=dtype, format=name, device=None)
    model = Decoder(CONFIG, tensors, backend=plain_torch, dtype=dtype, weight_format=name)
    scales = sum(w.out_features for layer in model.layers for w in (*layer.qkv, layer.o, *layer.gate_up, layer.down))
    assert model.nbytes == pytest.approx(weight_bytes(CONFIG, name, dtype), abs=4 * scales)  # one a row, not counted


def test_a_model_that_does_not_fit_says_what_would():
    """The formats that are named fit, and they only."""
    pools = sizes()
    free = weight_bytes(CONFIG, "bfloat16", "float32") + pools.num_bytes
    require_room(CONFIG, "bfloat16", pools, free=free)
    with pytest.raises(TwofoldError, match=r"the weights take .* GB and the KV cache .* GB, and the GPU has") as error:
        require_room(CONFIG, "float32", pools, free=free)
    named = set(re.findall(r"--weights (\w+)", str(error.value)))
    fitting = {name for name in WEIGHT_FORMATS if weight_bytes(CONFIG, name, "float32") + pools.num_bytes <= free}
    assert named == fitting
    assert "bfloat16" in named


def test_a_pool_that_does_not_fit_names_smaller_formats_of_it():
    pools = sizes(num_blocks=10_000)
    free = weight_bytes(CONFIG, "float32", "float32") + pools.num_bytes // 2
    with pytest.raises(TwofoldError, match=r"--kv-cache-dtype int4.* would fit"):
        require_room(CONFIG, "float32", pools, free=free)
    with pytest.raises(TwofoldError, match="no format of weights or of the KV cache would fit"):
        require_room(CONFIG, "float32", pools, free=10)


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "kivi4"])
def test_a_pool_fills_the_room_there_is(kv_cache_dtype):
    room = 10_000_000
    filled = sizes(kv_cache_dtype=kv_cache_dtype).filling(room)
    assert room - filled.block_bytes[0] < filled.num_bytes <= room
    assert filled.max_model_len == CONFIG.max_position_embeddings
    assert sizes().filling(0).num_blocks == 0


class Measuring(ModelRunner):
    """A plain runner that says what a step takes."""

    def __init__(self, *args, most_seqs, **kwargs):
        super().__init__(*args, **kwargs)

    def bytes_of_a_step(self, num_tokens: int, num_blocks: int) -> int:
        assert (num_tokens, num_blocks) == (8192, 16)  # the largest step; the longest sequence
        return 1_000_000


@pytest.fixture
def small_device(monkeypatch):
    """As if there were a device with so many bytes left for the pool once the weights are there."""
    monkeypatch.setitem(SHAPES, "small", SMALL)

    def device(*rooms: int):
        left = list(rooms)
        how = Execution(Measuring, 1, 256, 8192, lambda share: round(share * left.pop(0)))
        monkeypatch.setattr(twofold.llm, "execution", lambda backend, device: how)

    return device


make = partial(LLM, "small", load="dummy", backend="plain_torch")


def test_the_pool_is_what_is_left(small_device):
    small_device(10_000_000, 4_000_000)
    llm = make(gpu_memory_utilization=0.5)
    config = llm.engine.config
    assert config.num_blocks == (2_000_000 - 1_000_000) // llm.cache.block_bytes[0]
    assert (config.lookahead, config.max_num_seqs, config.max_num_batched_tokens) == (1, 256, 8192)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    assert len(llm.generate({"prompt_token_ids": [5, 6]}, params)[0].outputs[0].token_ids) == 4


def test_too_little_is_a_sentence_before_or_after_loading(small_device):
    small_device(10_000)
    with pytest.raises(TwofoldError, match="the weights take"):
        make()
    small_device(10_000_000, 1_010_000)
    with pytest.raises(TwofoldError, match="KV cache"):
        make(max_model_len=256, gpu_memory_utilization=1.0)
    with pytest.raises(TwofoldError, match="gpu-memory-utilization"):
        make(gpu_memory_utilization=0)


@pytest.mark.parametrize("weights", ["auto", "int8", "q4_1", "sparse24"])
@pytest.mark.parametrize("backend", ["reference", "plain_torch"])
def test_random_weights_of_a_config_alone(monkeypatch, backend, weights):
    """The same seed and formats make the same model, whichever way it is served."""
    monkeypatch.setitem(SHAPES, "small", SMALL)
    first, again = (LLM("small", load="dummy", backend=backend, weights=weights, num_blocks=9) for _ in range(2))
    assert first.decoder.fingerprint == again.decoder.fingerprint
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    answers = [llm.generate({"prompt_token_ids": [5, 6, 7]}, params)[0].outputs[0].token_ids for llm in (first, again)]
    assert answers[0] == answers[1]
    assert len(answers[0]) == 6


def test_random_weights_of_a_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    llm = LLM(tmp_path, load="dummy", num_blocks=9)
    assert llm.decoder.config.hidden_size == 32
    assert llm.engine.config.eos_token_ids == (2,)
    with pytest.raises(TwofoldError, match="no tokenizer"):
        llm.generate("text")


@pytest.mark.parametrize(
    ("model", "load", "says"), [("nobody", "dummy", "config.json"), (None, "other", "auto or dummy")]
)
def test_what_cannot_be_made_up_is_a_sentence(model, load, says):
    with pytest.raises(TwofoldError, match=says):
        LLM(model, load=load)


def test_loading_tells_how_far_it_is(tmp_path):
    from twofold.conformance.strategies.small_checkpoint import small_checkpoint

    told = []
    LLM(small_checkpoint(tmp_path), num_blocks=9, on_progress=lambda *what: told.append(what))
    done = [done for _, done, _ in told]
    assert done == sorted(done)
    assert told[-1][1] == told[-1][2]


def test_who_executes_steps_where():
    """Without a GPU the plain runner does, whatever the backend."""
    how = execution(plain_torch, None)
    assert (how.runner, how.lookahead, how.room) == (ModelRunner, 0, None)
    assert execution(fast, "cpu").runner is ModelRunner


@pytest.mark.needs("gpu")
def test_on_a_gpu_the_pool_is_measured(monkeypatch):
    """Steps run a step ahead on `fast`'s own runner, over what half of the memory has left for the pool."""
    monkeypatch.setenv("TWOFOLD_CHECK", "0")
    monkeypatch.setitem(SHAPES, "small", SMALL)
    llm = LLM("small", load="dummy", backend="fast", gpu_memory_utilization=0.5)
    free, total = torch.cuda.mem_get_info()
    assert isinstance(llm.engine.runner, GraphRunner)
    assert llm.engine.config.lookahead == 1
    assert 0.1 * total < llm.cache.pools[0].nbytes < 0.5 * total
    assert free > 0.4 * total
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": [5, 6, i]} for i in range(7, 12)], params)
    assert all(output.error is None and len(output.outputs[0].token_ids) == 20 for output in outputs)
    del llm, outputs
    with pytest.raises(TwofoldError, match="the GPU has"):
        LLM("small", load="dummy", backend="fast", num_blocks=10**9)
