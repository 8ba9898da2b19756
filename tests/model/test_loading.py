"""From a checkpoint's tensors to weights: each read once, checked and named, hashed, and let go."""

import weakref

import ml_dtypes
import numpy as np
import pytest

import reference
from reference.linear.weight import Weight
from reference.model.decoder import Decoder
from twofold.conformance.strategies.model import random_model


class Counting(dict):
    def __init__(self, tensors):
        super().__init__(tensors)
        self.reads = []

    def __getitem__(self, name):
        self.reads.append(name)
        return super().__getitem__(name)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_each_tensor_is_read_once(family):
    """So a mapping that reads on access may let each go. Tied or not."""
    config, tensors = random_model(family)
    mapping = Counting(tensors)
    Decoder(config, mapping, backend=reference)
    assert sorted(mapping.reads) == sorted(config.expected_tensors())


def test_no_more_than_a_layer_is_held_twice():
    """While loading, of q, k and v, gate and up, only those of the layer being stacked are in memory twice."""
    config, tensors = random_model("llama", num_layers=6)
    sources: list[weakref.ref] = []

    class Watched(dict):
        def __getitem__(self, name):
            array = super().__getitem__(name).copy()
            if ".q_proj." in name or ".gate_proj." in name:
                alive = [source for source in sources if source() is not None]
                assert not alive, f"at {name}, {len(alive)} sources of stacked weights are still held"
            if any(part in name for part in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
                sources.append(weakref.ref(array))
            return array

    decoder = Decoder(config, Watched(tensors), backend=reference)
    assert decoder.nbytes == sum(array.nbytes for array in tensors.values())


def test_missing_and_misshapen_tensors_are_named():
    config, tensors = random_model("qwen2")
    bias = "model.layers.1.self_attn.k_proj.bias"
    without = {name: array for name, array in tensors.items() if name != bias}
    with pytest.raises(ValueError, match=rf"tensors: expected all .* such as {bias} \[16\]"):
        Decoder(config, without, backend=reference)
    with pytest.raises(ValueError, match=rf"{bias}: expected shape \[16\], got \[15\]"):
        Decoder(config, tensors | {bias: tensors[bias][1:]}, backend=reference)
    weight = "model.layers.0.mlp.down_proj.weight"
    with pytest.raises(ValueError, match=rf"{weight}: expected shape \[32, 48\], got \[48, 32\]"):
        Decoder(config, tensors | {weight: tensors[weight].T}, backend=reference)
    with pytest.raises(ValueError, match=rf"{weight}: expected shape \[32, 48\], got \[32, 32\]"):
        Decoder(
            config, tensors | {weight: Weight.from_float(tensors[weight][:, :32], format="q8_0")}, backend=reference,
            weight_format="as-is",
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"model\.norm\.weight: expected floating point numbers, got int64"):
        Decoder(config, tensors | {"model.norm.weight": np.ones(32, np.int64)}, backend=reference)


def test_a_kept_weight_needs_as_is():
    config, tensors = random_model("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    kept = tensors | {name: Weight.from_float(tensors[name], format="q8_0")}
    with pytest.raises(ValueError, match=f"weight_format: expected as-is, since {name} is in q8_0"):
        Decoder(config, kept, backend=reference, weight_format="auto")


@pytest.mark.parametrize(("argument", "value"), [("dtype", "float8"), ("weight_format", "int3"), ("device", "cuda")])
def test_unknown_options_are_refused(argument, value):
    with pytest.raises(ValueError, match=value):
        Decoder(*random_model("llama"), backend=reference, **{argument: value})


def test_checkpoints_in_sixteen_bits_are_widened():
    """A bfloat16 checkpoint in a float32 decoder is the float32 decoder of its values."""
    config, tensors = random_model("llama")
    narrow = {name: array.astype(ml_dtypes.bfloat16) for name, array in tensors.items()}
    wide = {name: array.astype(np.float32) for name, array in narrow.items()}
    layers = [Decoder(config, kept, backend=reference).layers[1] for kept in (narrow, wide)]
    for name in ("attention_norm", "feed_forward_norm"):
        assert np.array_equal(*(getattr(layer, name) for layer in layers))
    assert np.array_equal(*(layer.qkv[0].arrays["weight"] for layer in layers))
    assert layers[0].down.arrays["weight"].dtype == np.float32


def fingerprint(model, **options):
    return Decoder(*model, backend=reference, **options).fingerprint


def test_the_fingerprint_tells_models_apart():
    """The same weights give the same; any one number, place, format or switch another gives another."""
    config, tensors = model = random_model("llama")
    name = "model.layers.1.mlp.gate_proj.weight"
    one_number, swapped = tensors[name].copy(), tensors[name].copy()
    one_number[17, 5] = np.nextafter(one_number[17, 5], np.float32(9))
    swapped[[3, 4]] = swapped[[4, 3]]
    others = [
        fingerprint((config, tensors | {name: one_number})),
        fingerprint((config, tensors | {name: swapped})),
        fingerprint((config, tensors | {name: -tensors[name]})),
        fingerprint(random_model("llama", seed=1)),
        fingerprint(random_model("llama", rope_base=500.0)),
        fingerprint(model, weight_format="int8"),
        fingerprint(model, weight_format="bfloat16"),
        fingerprint(model, dtype="bfloat16"),
        fingerprint((config, tensors | {name: Weight.from_float(tensors[name], format="q8_0")}), weight_format="as-is"),
    ]
    assert fingerprint(model) == fingerprint(random_model("llama"))
    assert len({fingerprint(model), *others}) == len(others) + 1


def test_the_rotary_tables_can_be_shorter_than_the_models_longest_context():
    config, tensors = random_model("llama")
    assert Decoder(config, tensors, backend=reference, max_positions=12).cos.shape == (12, 4)
    assert Decoder(config, tensors, backend=reference).cos.shape == (256, 4)
