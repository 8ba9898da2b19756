"""`twofold bench swap`, on a few small blocks. Its figures need a GPU."""

import pytest
import torch

from reference.model.config import ModelConfig
from twofold.bench import swap
from twofold.cli import run
from twofold.conformance.strategies.model import small_shape
from twofold.errors import TwofoldError

CONFIG = ModelConfig.from_hf(small_shape(swap.SHAPE, head_dim=16, num_hidden_layers=1))


def test_blocks_go_out_and_come_back_both_ways():
    found = dict(swap.times(CONFIG, (1, 3), rounds=1))
    assert [*found] == [1, 3]
    for count, figures in found.items():
        assert figures["bytes"] == count * 2 * swap.BLOCK_SIZE * CONFIG.num_kv_heads * CONFIG.head_dim * 2
        assert 0.65 < figures["coded_bytes"] / figures["bytes"] < 0.8
        seconds = [figures[f"{name}_{way}_ms"] for name in ("plain", "coded") for way in ("out", "back")]
        assert min(seconds) > 0
        assert figures["times"] == pytest.approx(sum(seconds[:2]) / sum(seconds[2:]))


def test_blocks_that_come_back_as_others_are_no_figure(monkeypatch):
    move = swap.BlockMover.move

    def wrong(self, batch):
        move(self, batch)
        if batch.swaps_in:
            self.cache.pools[0][batch.swaps_in[0].block_ids[0], 0] ^= 1

    monkeypatch.setattr(swap.BlockMover, "move", wrong)
    with pytest.raises(TwofoldError, match="came back as others"):
        [*swap.times(CONFIG, (2,), rounds=1)]


def test_without_a_gpu_it_is_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(["bench", "swap"]) == 2
    assert "needs a GPU" in capsys.readouterr().err
