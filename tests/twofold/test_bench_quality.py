"""`twofold bench quality`: the figures are those of the text-book, every case is what it says, and a sweep goes on."""

import json

import numpy as np
import pytest

import reference
from reference.kv_cache.formats import KV_FORMATS
from reference.linear.gptq import hessian, row_errors
from reference.model.decoder import Decoder
from twofold.bench.quality import Sweep, matrix_types, plots, show
from twofold.bench.quality.cases import Case, all_cases, cache_case, quick_cases, weights_case
from twofold.bench.quality.fitting import fitted_decoder
from twofold.bench.quality.known_models import KNOWN_MODELS
from twofold.bench.quality.one_side import IN_PARTS, round_side, with_one_side
from twofold.bench.quality.peer import perplexity_of_transformers
from twofold.bench.quality.reading import Reader, predictions, predictions_on_device
from twofold.bench.quality.text import draw_windows
from twofold.bench.report import markdown
from twofold.checkpoints import load_checkpoint
from twofold.cli import run
from twofold.conformance.strategies.small_checkpoint import small_checkpoint
from twofold.errors import TwofoldError

CONTEXT = 24
TEXT = "The state of the union is what it was: hello, world, and hello again. " * 12


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return load_checkpoint(small_checkpoint(tmp_path_factory.mktemp("small")))


@pytest.fixture(scope="module")
def windows(checkpoint):
    return draw_windows([TEXT], checkpoint.tokenizer.encode, context=CONTEXT, num_windows=2, num_calibration=2, seed=0)


@pytest.fixture
def decoder(checkpoint):
    return Decoder(checkpoint.config, checkpoint.tensors(), backend=reference)


def sweep(path, checkpoint, windows, cases, seed=0):
    return Sweep(path, checkpoint, windows, cases, backend=reference, text="a text", seed=seed)


# ---- the text -------------------------------------------------------------------------------------------------------


def test_windows_do_not_overlap_and_calibration_is_none_of_them():
    """Of several texts the first window of each comes first; each token is in one window at most."""
    texts = ["".join(chr(i) for i in range(start, start + 50)) for start in (100, 200, 300)]
    windows = draw_windows(texts, lambda t: [ord(c) for c in t], context=9, num_windows=4, num_calibration=3, seed=1)
    everything = np.concatenate([windows.judged.ravel(), windows.calibration.ravel()])
    assert len(everything) == len(set(everything.tolist())) == 70
    assert {int(row[0]) for row in windows.judged[:3]} == {100, 200, 300}
    assert windows.num_predictions == 36


def test_a_seed_draws_the_same_windows_again():
    texts = [chr(100 + i) * 40 for i in range(9)]
    options = {"context": 7, "num_windows": 3, "num_calibration": 0}
    encode = lambda t: [ord(c) for c in t]  # noqa: E731
    once, again, other = (draw_windows(texts, encode, seed=seed, **options).fingerprint() for seed in (0, 0, 1))
    assert once == again != other


def test_a_text_too_short_is_one_sentence():
    with pytest.raises(TwofoldError, match="the text is too short: it has 2 windows of 5 tokens, not 2 to judge on"):
        draw_windows(["abcdefghijklm"], list, context=4, num_windows=2, num_calibration=1, seed=0)


# ---- the figures ----------------------------------------------------------------------------------------------------


def test_figures_in_numpy_and_on_a_device_are_those_of_the_definition():
    rng = np.random.default_rng(0)
    p, q = rng.normal(0, 3, (2, 40, 17)).astype(np.float32)
    targets = rng.integers(0, 17, 40)
    import torch

    found = predictions(p, q, targets)
    on_device = predictions_on_device(torch.tensor(p), torch.tensor(q), targets)
    soft = [np.exp(x.astype(np.float64)) / np.exp(x.astype(np.float64)).sum(1, keepdims=True) for x in (p, q)]
    for result in (found, on_device):
        np.testing.assert_allclose(result.losses, -np.log(soft[1][np.arange(40), targets]), rtol=1e-9)
        np.testing.assert_allclose(result.divergences, (soft[0] * np.log(soft[0] / soft[1])).sum(1), rtol=1e-9)
        assert np.array_equal(result.agrees, p.argmax(1) == q.argmax(1))


def test_the_baseline_is_at_no_distance_from_itself(checkpoint, windows, tmp_path):
    results = sweep(tmp_path / "q.json", checkpoint, windows, []).run()
    figures = results["baseline"]
    assert (figures["change"], figures["divergence"], figures["agreement"]) == (0, 0, 100)


def test_perplexity_is_that_of_transformers(checkpoint, windows, tmp_path):
    """On the same windows, within 0.1 %, for an independent implementation with the same random weights."""
    theirs = perplexity_of_transformers(checkpoint, windows)
    ours = sweep(tmp_path / "q.json", checkpoint, windows, []).run()["baseline"]["perplexity"]
    assert abs(ours / theirs - 1) < 1e-3, f"perplexity {ours:.5f}, transformers {theirs:.5f}"


@pytest.mark.parametrize("format", ["float32", "int8", "kivi4"])
def test_windows_read_together_are_read_alone(decoder, windows, format):
    """Each begins with an empty cache."""
    reader = Reader(decoder, KV_FORMATS[format])
    together = reader.hidden(windows.judged[:, :-1])
    alone = np.concatenate([reader.hidden(window[None, :-1]) for window in windows.judged])
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)


def test_a_window_longer_than_the_text_makes_kivi_exact(decoder, windows):
    """What is never old is never rounded; with a window of 0 everything sealed is."""
    text = np.tile(windows.judged[:1, :-1], (1, 3))
    exact = Reader(decoder).hidden(text)
    far, near = (Reader(decoder, KV_FORMATS["kivi2"].with_window(window)).hidden(text) for window in (72, 0))
    np.testing.assert_allclose(far, exact, rtol=1e-4, atol=1e-5)
    assert np.abs(near[:31] - exact[:31]).max() < 1e-4, "the first group is not sealed before its 32nd token"
    assert np.abs(near[32:] - exact[32:]).max() > 1e-3


# ---- the cases ------------------------------------------------------------------------------------------------------


def matrices(decoder):
    return [
        w.to(None).dequantize() for layer in decoder.layers for w in (*layer.qkv, layer.o, *layer.gate_up, layer.down)
    ]


def test_rounding_is_what_the_decoder_does_at_load(checkpoint, decoder, windows):
    ours = fitted_decoder(decoder, weights_case("int4-32"), windows.calibration)
    theirs = Decoder(checkpoint.config, checkpoint.tensors(), backend=reference, weight_format="int4-32")
    assert all(np.array_equal(a, b) for a, b in zip(matrices(ours), matrices(theirs)))
    before = Decoder(checkpoint.config, checkpoint.tensors(), backend=reference)
    assert all(np.array_equal(a, b) for a, b in zip(matrices(decoder), matrices(before))), "the baseline was changed"


def test_gptq_sees_what_arrives_at_each_layer(decoder, windows):
    """The first matrix is better on its input than rounding is; so is the last, on what the fitted ones before give."""
    inputs = {}

    def listen(weight, x):
        inputs[id(weight)] = x
        return weight

    from twofold.bench.quality import fitting

    text = windows.calibration[:, :-1]
    fitting._fitted(decoder, listen, text)
    fitted = fitted_decoder(decoder, Case("g", "weights", "int4-32", "GPTQ"), text)
    rounded = fitted_decoder(decoder, weights_case("int4-32"), text)
    (weight,) = decoder.layers[0].qkv
    h = hessian([inputs[id(weight)]])
    errors = [
        row_errors(weight.dequantize() - d.layers[0].qkv[0].to(None).dequantize(), h).sum() for d in (fitted, rounded)
    ]
    assert errors[0] < errors[1]


def test_smoothing_changes_nothing_until_it_is_rounded(decoder, windows):
    smoothed = fitted_decoder(decoder, Case("s", "weights", "float32", "SmoothQuant"), windows.calibration[:, :-1])
    text = windows.judged[:, :-1]
    np.testing.assert_allclose(Reader(smoothed).hidden(text), Reader(decoder).hidden(text), rtol=1e-3, atol=1e-4)
    assert not np.array_equal(smoothed.layers[0].attention_norm, decoder.layers[0].attention_norm)


@pytest.mark.parametrize("method", ["magnitude", "Wanda"])
def test_pruning_leaves_out_the_share_it_says(decoder, windows, method):
    half = fitted_decoder(decoder, Case("p", "pruning", method=method, sparsity=0.5), windows.calibration[:, :-1])
    of_four = fitted_decoder(decoder, Case("p", "pruning", "sparse24", method), windows.calibration[:, :-1])
    for pruned in (half, of_four):
        assert all(abs((matrix == 0).mean() - 0.5) < 0.02 for matrix in matrices(pruned))
    assert all(((m.reshape(len(m), -1, 4) != 0).sum(-1) <= 2).all() for m in matrices(of_four))


def test_every_case_of_the_issue_is_there():
    """For the real model: weights, caches, windows, pruning; what is lossless by construction says so."""
    everything = all_cases(frozenset({"Q4_1"}), 3)
    cases = {case.name: case for case in everything}
    groups = {f"int4-{size}{how}" for size in (32, 64, 128) for how in ("", ", GPTQ")}
    assert groups | {"bfloat16", "int8", "w8a8", "w8a8, SmoothQuant", "q4_1", "as stored"} <= set(cases)
    assert {f"kivi{bits}, window {window}" for bits in (2, 4) for window in (0, 32, 128)} <= set(cases)
    assert {"25%, Wanda", "50%, magnitude", "2:4, Wanda", "3 to 1 KV heads"} <= set(cases)
    assert {"int4, keys", "int4, values", "kivi2, keys", "kivi2, values"} <= set(cases)
    assert {name for name, case in cases.items() if case.lossless} == {"q4_1", "as stored"}
    assert len({case.key for case in everything}) == len(everything)
    quick = quick_cases(everything)
    assert len(quick) == 10
    assert not any(case.needs_calibration for case in quick)


def test_known_models_cost_what_is_said_of_them():
    """A 14B model with full heads 0.7 to 1 MB a token; grouped a quarter of that and less."""
    rows = {model.name: model.row() for model in KNOWN_MODELS}
    full, grouped = rows["Qwen1.5-14B"], rows["Qwen2.5-14B"]
    assert full["kind"] == "MHA"
    assert 0.7e6 <= full["bytes_per_token"]["bfloat16"] <= 1e6
    assert grouped["bytes_per_token"]["bfloat16"] < full["bytes_per_token"]["bfloat16"] / 4
    assert rows["SmolLM2-135M"]["bytes_per_token"]["bfloat16"] == 2 * 2 * 30 * 3 * 64


# ---- the sweep ------------------------------------------------------------------------------------------------------


def test_both_sides_make_the_format(decoder, windows):
    """Keys rounded alone, and then values alone, in a cache of full precision: what a cache of the format gives."""
    format, tokens = KV_FORMATS["int4"], windows.judged[:1, :-1]
    keys = with_one_side(decoder, format, "keys")
    values, both = (with_one_side(one, format, "values") for one in (decoder, keys))
    cached = Reader(decoder, format).hidden(tokens)
    np.testing.assert_allclose(Reader(both, IN_PARTS).hidden(tokens), cached, atol=1e-5)
    for one in (keys, values):
        assert not np.allclose(Reader(one, IN_PARTS).hidden(tokens), cached, atol=1e-3), "the other side is rounded too"


@pytest.mark.parametrize(("name", "side"), [("kivi2", "keys"), ("kivi2", "values"), ("int4", "keys")])
def test_groups_of_a_side_have_few_values(name, side):
    """KIVI's keys by channel over 32 tokens, everything else by token over 32 channels: no more values in a group than
    codes, none further off than half a step. Tokens that fill no group stay as they are."""
    format, num_tokens, dim = KV_FORMATS[name], 70, 64
    x = np.random.default_rng(0).normal(size=(num_tokens, 2, dim)).astype(np.float32)
    got = round_side(x, format, side)
    if name == "kivi2" and side == "keys":
        assert np.array_equal(got[64:], x[64:])
        x, got = (a[:64].reshape(2, 32, -1).transpose(0, 2, 1) for a in (x, got))
    x, got = x.reshape(-1, 32), got.reshape(-1, 32)
    assert max(len(set(row)) for row in got.tolist()) <= 2**format.bits
    step = np.ptp(x, axis=1) / (2**format.bits - 1)
    assert (np.abs(got - x) <= 0.51 * step[:, None]).all()


SOME = [weights_case("int8"), cache_case("kivi2", 0), Case("25%, Wanda", "pruning", method="Wanda", sparsity=0.25)]


def test_the_same_seed_gives_the_same_json(checkpoint, windows, tmp_path):
    once, again = (sweep(tmp_path / f"{i}.json", checkpoint, windows, SOME).run() for i in range(2))
    assert json.dumps(once) == json.dumps(again)
    assert [case["name"] for case in once["cases"]] == [case.name for case in SOME]


def test_every_case_runs_and_is_shown(checkpoint, windows, tmp_path):
    """On a model with every kind of case; 4-bit weights take fewer bytes than 8-bit ones; plots are the same files."""
    cases = all_cases(matrix_types(checkpoint), checkpoint.config.num_kv_heads)
    results = sweep(tmp_path / "q.json", checkpoint, windows, cases).run()
    found = {(case["kind"], case["name"]): case for case in results["cases"]}
    assert all(np.isfinite(case["perplexity"]) for case in found.values())
    size = {name: case["bytes_per_weight"] for (kind, name), case in found.items() if kind == "weights"}
    assert size["int4-128"] < size["int8"] < size["bfloat16"] == 2
    assert found["cache", "kivi2, window 0"]["bytes_per_token"] < found["cache", "int4"]["bytes_per_token"]
    for kind, coarse in (("weights", "int4-32"), ("cache", "int4")):
        assert 0 < found[kind, "int8"]["divergence"] < found[kind, coarse]["divergence"]
    drawn = show.tables(results)
    assert all(len(row) == len(columns) for _, columns, rows, _ in drawn for row in rows)
    assert sum(len(rows) for _, _, rows, _ in drawn) == len(cases) + len(KNOWN_MODELS)
    assert "| --- |" in markdown(drawn[0])
    once, again = ([p.read_bytes() for p in plots.draw(results, tmp_path / name)] for name in "ab")
    assert once == again
    assert len(once) == 3


def test_every_backend_finds_what_the_reference_finds(checkpoint, tmp_path, backend):
    """One case of each way to make a decoder: on a short text, as kernels are interpreted here."""
    short = draw_windows([TEXT], checkpoint.tokenizer.encode, context=12, num_windows=1, num_calibration=1, seed=0)
    cases = [
        weights_case("bfloat16"),
        Case("int8, GPTQ", "weights", "int8", "GPTQ"),
        Case("w8a8, SmoothQuant", "weights", "w8a8", "SmoothQuant"),
        Case("2:4, Wanda", "pruning", "sparse24", "Wanda"),
        Case("fewer heads", "heads", num_kv_heads=1),
        cache_case("kivi4", 0),
    ]
    ours, theirs = (
        Sweep(tmp_path / f"{i}.json", checkpoint, short, cases, backend=computes, text="a text", seed=0).run()
        for i, computes in enumerate((backend, reference))
    )
    for got, expected in zip(ours["cases"], theirs["cases"]):
        assert got["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-3), got["name"]
        assert got["bytes_per_weight"] == expected["bytes_per_weight"], got["name"]


def test_an_interrupted_sweep_goes_on_from_where_it_was(checkpoint, windows, tmp_path):
    """What is done is not done again, and the results are those of a sweep that was not interrupted."""
    path = tmp_path / "q.json"
    whole = sweep(tmp_path / "whole.json", checkpoint, windows, SOME).run()
    told = []

    def interrupt(what, total):
        told.append(what)
        if what == f"{SOME[2].key}: weights":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(path, checkpoint, windows, SOME).run(interrupt)
    assert not sweep(path, checkpoint, windows, SOME, seed=1).done, "what was done with other settings"
    told.clear()
    rest = sweep(path, checkpoint, windows, SOME)
    assert [*rest.done] == [case.key for case in SOME[:2]]
    assert rest.run(lambda what, total: told.append((what, total))) == whole
    assert {what for what, _ in told} == {"baseline", f"{SOME[2].key}: weights", SOME[2].key}
    assert {total for _, total in told} == {len(told)}, "the number that the estimate goes by"
    (tmp_path / "q.sweep.json").write_text('{"settings"')
    assert not sweep(path, checkpoint, windows, SOME).done, "a broken file is none"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def quality(checkpoint, text, *arguments):
    where = ["--results", str(text.with_suffix(".json")), "--text", str(text), "--model", str(checkpoint.path)]
    return run(["bench", "quality", *where, "--context", "24", "--tokens", "48", *arguments])


def test_the_command_writes_its_results_and_nothing_else(checkpoint, text, capsys):
    assert (
        quality(
            checkpoint, text, "--weights", "int8", "--kv-cache-dtype", "kivi2", "--kv-window", "0", "--only", "heads"
        )
        == 0
    )
    saved = json.loads(text.with_suffix(".json").read_text())
    assert [case["name"] for case in saved["results"]["cases"]] == ["int8", "kivi2, window 0", "2 to 1 KV heads"]
    assert saved["results"]["settings"]["seed"] == 0
    assert saved["versions"]["numpy"] == np.__version__
    assert {path.name for path in text.parent.iterdir()} == {"text.txt", "text.json"}
    assert "KV cache, beside" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--context", "200"], "the text is too short"),
        (["--context", "5000"], "the model was made for 256 tokens"),
        (["--weights", "int3"], "one of float32"),
        (["--weights", "int4-7"], "an even number"),
        (["--kv-cache-dtype", "int3"], "expected one of auto"),
        (["--kv-cache-dtype", "int8", "--kv-window", "32"], "KV format int8 has no window"),
        (["--kv-window", "32"], "say which with --kv-cache-dtype"),
        (["--tokens", "0"], "at least 1"),
        (["--only", "int5"], "--only int5: expected weights, pruning, heads, cache, sides, or one of 'bfloat16'"),
        (["--text", "nowhere.txt"], "No such file"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(checkpoint, text, capsys, arguments, says):
    assert quality(checkpoint, text, *arguments) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.startswith("twofold: ")
    assert error.count("\n") == 1
