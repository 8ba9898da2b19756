"""Safetensors: what the library writes is read; what contradicts itself is a sentence before anything is read."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from twofold import bounded
from twofold.checkpoints.safetensors import SafetensorsFile
from twofold.conformance.strategies.checkpoints import damages, one_sentence_at_most
from twofold.errors import TwofoldError

FLOATS = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]


@st.composite
def float_tensors(draw):
    """A few tensors: scalars, empty ones, several dtypes and axes."""
    names = draw(
        st.lists(st.text(min_size=1, max_size=8).filter(lambda n: n != "__metadata__"), max_size=4, unique=True)
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), label="seed"))
    shapes = st.lists(st.integers(0, 5), max_size=3)
    return {name: np.asarray(rng.normal(size=draw(shapes)), draw(st.sampled_from(FLOATS))) for name in names}


@given(float_tensors())
@settings(max_examples=200)
def test_what_the_library_writes_is_read_bit_for_bit(tmp_path_factory, tensors):
    path = tmp_path_factory.getbasetemp() / "written.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    file = SafetensorsFile(path)
    assert set(file.tensors) == set(tensors)
    for name, tensor in tensors.items():
        read = file.read(name)
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape), name
        assert read.tobytes() == tensor.tobytes(), name


def made_of(header, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def stored(begin: int, end: int, dtype: str = "F32", shape=(2,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


TWICE = b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "a": {}}'
HOSTILE = {
    "nothing at all": (b"", "not a safetensors file"),
    "seven bytes": (bytes(7), "not a safetensors file"),
    "a header of nothing": (bytes(8), "not a JSON object"),
    "a header longer than the file": (made_of({}, length=1000), "truncated"),
    "a header of 2^60 bytes": (made_of({}, length=2**60), "truncated"),
    "a header of 2^64 - 1 bytes": (made_of({}, length=2**64 - 1), "truncated"),
    "no object": (made_of([1, 2]), "not a JSON object"),
    "half an object": (made_of(b'{"a": '), "not valid JSON"),
    "no text": (made_of(b'{"\xff": 1}'), "not valid JSON"),
    "deep nesting": (made_of(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "nested too deeply"),
    "a number of a million digits": (made_of(b'{"a":' + b"9" * 1_000_000 + b"}"), "not valid JSON"),
    "a name twice": (made_of(TWICE), "says 'a' twice"),
    "metadata of numbers": (made_of({"__metadata__": {"a": 1}}), "not a map of strings"),
    "an entry that is none": (made_of({"a": 7}), "its entry is not"),
    "an entry with more in it": (made_of({"a": stored(0, 8) | {"x": 1}}, bytes(8)), "its entry is not"),
    "an unknown dtype": (made_of({"a": stored(0, 8, "F31")}, bytes(8)), "unknown dtype 'F31'"),
    "a dtype that is a list": (made_of({"a": stored(0, 8) | {"dtype": ["F32"]}}, bytes(8)), "unknown dtype"),
    "a negative size": (made_of({"a": stored(0, 8, shape=(-1, -2))}, bytes(8)), "not a list"),
    "a size that is no integer": (made_of({"a": stored(0, 8, shape=(2.0,))}, bytes(8)), "not a list"),
    "a size that is a flag": (made_of({"a": stored(0, 4, shape=(True,))}, bytes(4)), "not a list"),
    "sizes that overflow": (
        made_of({"a": stored(0, 0, shape=(2**32, 2**32))}),
        "takes 73,786,976,294,838,206,464 bytes",
    ),
    "sizes that overflow to the right number": (made_of({"a": stored(0, 8, shape=(2**62 + 2,))}, bytes(8)), "takes"),
    "2^60 numbers": (made_of({"a": stored(0, 2**62, shape=(2**60,))}), "truncated"),
    "nine axes": (made_of({"a": stored(0, 4, shape=(1,) * 9)}, bytes(4)), "at most 8 sizes"),
    "three offsets": (made_of({"a": stored(0, 8) | {"data_offsets": [0, 4, 8]}}, bytes(8)), "not two positions"),
    "offsets the wrong way round": (made_of({"a": stored(8, 0)}, bytes(8)), "takes 8 bytes"),
    "more bytes than its shape": (made_of({"a": stored(0, 12)}, bytes(12)), "takes 8 bytes"),
    "data cut short": (made_of({"a": stored(0, 8)}, bytes(7)), "truncated: a ends 1 bytes past"),
    "bytes at the end": (made_of({"a": stored(0, 8)}, bytes(9)), "1 bytes after its last tensor"),
    "tensors that overlap": (made_of({"a": stored(0, 8), "b": stored(4, 12)}, bytes(12)), "b overlaps"),
    "tensors in one place": (made_of({"a": stored(0, 8), "b": stored(0, 8)}, bytes(8)), "b overlaps"),
    "a hole": (made_of({"a": stored(4, 12)}, bytes(12)), "a leaves a hole"),
    "a name that a terminal would obey": (made_of({"\x1b[2J\nhi": 7}), r"\x1b[2J\nhi: its entry is not"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_a_sentence(tmp_path, name):
    data, says = HOSTILE[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(TwofoldError) as raised:
        SafetensorsFile(path)
    assert says in str(raised.value), raised.value
    assert str(raised.value).isprintable()


def test_a_header_with_more_in_it_than_any_model_is_refused_unparsed(tmp_path):
    path = tmp_path / "model.safetensors"
    for header in (
        b"[" * (bounded.MAX_CONTAINERS + 1),
        b"," * (bounded.MAX_VALUES + 1),
        b" " * (bounded.MAX_BYTES + 1),
    ):
        path.write_bytes(made_of(b"{" + header))
        with pytest.raises(TwofoldError, match="more"):
            SafetensorsFile(path)


def test_integers_are_left_to_other_programs(tmp_path):
    save_file({"codes": np.zeros(4, np.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(TwofoldError, match="codes is stored as I8"):
        SafetensorsFile(tmp_path / "model.safetensors").read("codes")


def test_what_is_no_file_is_a_sentence(tmp_path):
    for path, says in ((tmp_path, "not a file"), (tmp_path / "nothing", "cannot be read")):
        with pytest.raises(TwofoldError, match=says):
            SafetensorsFile(path)


SOUND = save({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(5, np.float16)}, {"format": "pt"})


@given(st.data())
@settings(max_examples=300)
def test_a_damaged_file_is_read_or_is_a_sentence(tmp_path_factory, data):
    """And what passes the check is what the library reads, too."""
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(data.draw(damages(len(SOUND)))(SOUND))
    with one_sentence_at_most():
        file = SafetensorsFile(path)
        for name, tensor in file.tensors.items():
            assert file.read(name).shape == tensor.shape


def test_a_file_cut_short_anywhere_is_refused(tmp_path):
    path = tmp_path / "cut.safetensors"
    for length in range(len(SOUND)):
        path.write_bytes(SOUND[:length])
        with pytest.raises(TwofoldError):
            SafetensorsFile(path)
