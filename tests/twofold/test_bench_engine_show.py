"""Tables and plots of `bench engine`, from results as it keeps them."""

import pytest

from twofold.bench.engine import DECKS, LLAMA, QWEN, Figure, plots, show
from twofold.bench.profiling import kernel_rooms, room_of, summary

KERNELS = [
    (0, 300, "_one_token_kernel"),
    (280, 310, "_rotary_write_kv_kernel"),
    (305, 400, "paged_decode_hopper_kernel"),
    (410, 560, "nvjet_tst_8x64_64x16_1x4_h_bz_TNT"),
    (555, 557, "_choose_kernel"),
    (560, 561, "Memcpy DtoH (Device -> Pinned)"),
]


def profile(step: int = 600) -> dict:
    """Kernels of a step, as `profiling.profile` gives them."""
    ranges = [(start + i * step, end + i * step, name) for i in range(3) for start, end, name in KERNELS]
    found, rooms = summary(ranges, 3), kernel_rooms()
    for name, kernel in found["kernels"].items():
        kernel["room"] = room_of(name, rooms)
    return found


@pytest.fixture
def results():
    figures: dict = {}
    for deck in DECKS:
        if deck.name == "bfloat16":
            for i, (seqs, prompt, _) in enumerate(deck.latency):
                for what, unit, limit in (("step", "ms", 0.42 + i), ("device idle", "%", None)):
                    name = f"{seqs} x {prompt}, {what}"
                    figure = Figure(deck.model, f"bfloat16: {name}", unit, 0.7 + 2 * i, limit, deck.targets.get(name))
                    figures.setdefault(deck.model, {})[figure.name] = figure.as_json()
    return {
        "figures": figures,
        "profiles": {f"{QWEN}, bfloat16: 1 x 512": profile()},
        "measured": {"device": "a GPU", "date": "2026-01-02", "command": "twofold bench engine --profile"},
    }


def test_a_waterfall_ends_at_the_measured_step(results):
    """Its parts make the step: bytes, what products and attention add beyond them, all other kernels, idle moments."""
    figure = results["figures"][QWEN]["bfloat16: 1 x 512, step"]
    parts = {name: size for name, size, _ in plots.bars(QWEN, figure, profile())}
    assert sum(parts.values()) == pytest.approx(figure["value"] * 1e3)
    assert parts["bytes of the weights"] + parts["bytes of keys and values"] == pytest.approx(figure["limit"] * 1e3)
    assert parts["bytes of the weights"] + parts["products, beyond these"] == pytest.approx(300 + 150 - 2)
    assert parts["bytes of keys and values"] + parts["attention, beyond these"] == pytest.approx(400 - 310)
    assert parts["rotary_write_kv"] == pytest.approx(10)
    assert parts["other kernels"] == pytest.approx(2 + 1)
    assert parts["idle"] == pytest.approx((2 * (600 - 561) + 3 * 10) / 3)


def test_a_table_names_every_run_that_it_has_figures_of(results):
    figure = next(iter(results["figures"][QWEN].values()))
    figure["run"] = {"date": "2026-01-01", "command": "twofold bench engine"}
    notes = show.qwen(results)[3]
    assert notes == [
        "a GPU, 2026-01-01: `twofold bench engine`",
        "a GPU, 2026-01-02: `twofold bench engine --profile`",
    ]


def test_every_plot_is_drawn_and_is_the_same_file_again(results, tmp_path):
    once, again = ({p.name: p.read_bytes() for p in plots.draw(results, tmp_path / name)} for name in "ab")
    assert once == again
    assert list(once) == ["engine-batches.svg", "engine-qwen3-1.svg"]
    assert b"vLLM" in once["engine-batches.svg"]
    for name in ("products", "rotary_write_kv", "idle", "a step"):
        assert name.encode() in once["engine-qwen3-1.svg"]


def test_without_figures_there_is_no_plot(tmp_path):
    assert plots.draw({"figures": {}, "profiles": {}}, tmp_path) == []


def test_tables_say_what_was_measured_on_what(results):
    """A row for each figure; columns that nobody fills are left out."""
    title, columns, rows, notes = show.llama(results)
    assert title == LLAMA
    assert columns == show.COLUMNS
    steps = {row[0]: row for row in rows}
    assert steps["bfloat16: 1 x 512, step"][1:] == ("0.70 ms", "0.42", "60%", "6.60", "5.70", "5.25")
    assert notes == ["a GPU, 2026-01-02: `twofold bench engine --profile`"]
    copied = {"SmolLM2": {"copying: with drafts": Figure("SmolLM2", "", "times", 2.5).as_json()}}
    _, columns, rows, _ = show.copying(results | {"figures": copied})
    assert columns == ("", "measured")
    assert rows == [("copying: with drafts", "2.50 times")]
