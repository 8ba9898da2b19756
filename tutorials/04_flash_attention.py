# %% [markdown]
# # Flash attention
#
# Attention without ever holding the matrix of scores: one tile of keys at a time, with a softmax that can be corrected
# as it goes. The result is exact, and memory is read once.
#
# ## The number that hurts
#
# Attention over $n$ tokens has $n^2$ scores for each head. Written down as the textbook has it, they are computed, stored,
# read for the softmax, stored again, and read once more to weigh the values. The inputs and the result are tiny beside
# them:

# %%
import numpy as np

from twofold.tutorial import body, check, figure, show

head_dim, num_bytes = 128, 2  # bf16
print(" tokens   q, k, v and out   scores, 4 trips   share of the traffic")
for n in (1_024, 4_096, 16_384, 131_072):
    useful = 4 * n * head_dim * num_bytes
    scores = 4 * n * n * num_bytes
    print(f"{n:7,}   {useful / 2**20:9.1f} MiB   {scores / 2**20:11,.0f} MiB   {scores / (scores + useful):10.1%}")

# %% [markdown]
# At 16 K tokens one head of one layer moves two gigabytes of scores to make four megabytes of output. A GPU that copies
# 3 TB/s spends its time waiting for memory; its arithmetic units idle. And at 128 K tokens the scores of one head do not
# fit on the card.
#
# ## The idea
#
# A softmax seems to need all scores at once: the largest, so that no exponential overflows, and the sum of all, before
# the first weight is known. The **online softmax** does not wait. For each query it keeps three things:
#
# - `top`: the largest score so far,
# - `total`: the sum of $e^{s - top}$ so far,
# - `acc`: the sum of $e^{s - top}\, v$ so far.
#
# When a tile of keys brings a larger score, everything kept is too large by the same factor, $e^{top' - top}$. One
# multiplication mends it:
#
# $$top' = \max(top, \max_j s_j)$$
#
# $$total' = e^{top - top'}\, total + \sum_j e^{s_j - top'} \qquad acc' = e^{top - top'}\, acc + \sum_j e^{s_j - top'} v_j$$
#
# In the end $out = acc / total$. So keys and values can pass by a tile at a time, and the only scores that ever exist are
# one tile's. On a GPU they live in registers.

# %% tags=["hide"]
from matplotlib.patches import Rectangle

_, axes = figure(7, 3.6)
num_tiles = 8
for row in range(num_tiles):
    for column in range(num_tiles):
        hidden, edge = column > row, column == row
        color = "#e5e5e5" if hidden else "#9cc3ea" if not edge else "#f2b134"
        axes.add_patch(Rectangle((column, num_tiles - 1 - row), 0.94, 0.94, color=color))
axes.annotate("", (3.9, 4.47), (0.05, 4.47), arrowprops={"arrowstyle": "->", "color": "#c2571a", "lw": 2})
axes.text(8.4, 6.6, "one program owns a row of tiles:\nits queries stay on the chip", color="#666666")
axes.text(8.4, 4.3, "keys and values pass by,\na tile at a time", color="#c2571a")
axes.text(8.4, 2.4, "yellow: cut by the causal mask\ngrey: hidden, never computed", color="#666666")
axes.text(4, -0.7, "keys", ha="center", color="#666666")
axes.text(-0.5, 4, "queries", va="center", rotation=90, color="#666666")
axes.set(xlim=(-1, 16), ylim=(-1.1, 8.2))
axes.axis("off")
None

# %% [markdown]
# ## The code
#
# This is the reference itself. The state and its update first, the heart of the matter:

# %%
from reference.attention import flash_attention as module

show(module.update_state)

# %% [markdown]
# What one program of a kernel does with it: its queries meet the keys of their sequence, tile by tile. Tiles that the
# mask hides entirely are not visited.

# %%
show(module.attend_query_tile, module.keys_seen_by_any)

# %% [markdown]
# And the op, which gives every sequence of a packed batch its tiles. (Its contract is on
# [its page](../ops/attention/flash_attention.md).)

# %%
body(module.flash_attention)

# %% [markdown]
# ## A run on real data
#
# Queries, keys and values of a real model: layer 10 of SmolLM2, reading a text. We take them where the model itself hands
# them to its cache.

# %%
import reference
from twofold import LLM, SamplingParams

captured = {}


class Listening:
    """The reference, but it keeps what layer 10 gives to attention."""

    calls = 0

    def __getattr__(self, name):
        return getattr(reference, name)

    def paged_attention(self, q, k_cache, v_cache, block_table, seq_lens, *rest, **options):
        if Listening.calls == 10 and len(q) > 1:
            blocks = block_table[0, : -(-int(seq_lens[0]) // k_cache.shape[1])]
            k, v = (cache[blocks].reshape(-1, *cache.shape[2:])[: seq_lens[0]] for cache in (k_cache, v_cache))
            captured.update(q=q.copy(), k=k.copy(), v=v.copy())
        Listening.calls += 1
        return reference.paged_attention(q, k_cache, v_cache, block_table, seq_lens, *rest, **options)


text = module.__doc__ * 2
llm = LLM(backend=Listening(), max_model_len=1024, max_num_batched_tokens=1024)
llm.generate(text, SamplingParams(temperature=0, max_tokens=1))
q, k, v = captured["q"], captured["k"], captured["v"]
print(f"{len(q)} tokens, {q.shape[1]} query heads, {k.shape[1]} KV heads of {q.shape[2]}")

# %% [markdown]
# Watch one query, the last, meet the keys tile by tile. The state is a correct answer at every moment: to the question
# asked about the keys seen so far.

# %%
from reference.attention.dense_attention import dense_attention

head, query = 4, len(q) - 1
group = q.shape[1] // k.shape[1]
scores = k[:, head // group] @ q[query, head] * q.shape[-1] ** -0.5

top, total, acc = -np.inf, 0.0, np.zeros(q.shape[-1])
tops, totals, errors = [], [], []
true = dense_attention(q[-1:], k, v)[0, head]
for start in range(0, len(k), module.TILE_KV):
    tile = slice(start, start + module.TILE_KV)
    new_top = max(top, scores[tile].max())
    weights = np.exp(scores[tile] - new_top)
    rescale = np.exp(top - new_top)
    total = rescale * total + weights.sum()
    acc = rescale * acc + weights @ v[tile, head // group]
    top = new_top
    tops.append(top)
    totals.append(total)
    errors.append(np.abs(acc / total - true).max())

_, (left, right) = figure(7, 3, columns=2)
left.plot(scores, color="#bbbbbb", lw=0.7, label="scores")
left.step(np.arange(len(tops)) * module.TILE_KV, tops, where="post", label="top so far")
left.set(xlabel="key", title="scores of the last query")
left.legend(frameon=False, fontsize=9)
right.semilogy(np.arange(1, len(errors) + 1), np.maximum(errors, 1e-9), marker="o", color="#c2571a")
right.set(xlabel="tiles seen", title="distance to the final output")
None

# %% [markdown]
# After the last tile the distance is rounding. Over all queries and heads at once:

# %%
offsets = np.array([0, len(q)], np.int32)
tiled, lse = reference.flash_attention(q, k, v, offsets, offsets)
dense = dense_attention(q, k, v)
print(f"largest difference between tiled and dense: {np.abs(tiled - dense).max():.1e}")

num_tiles = -(-len(q) // module.TILE_Q)
visited = num_tiles * (num_tiles + 1) // 2
print(f"tiles visited: {visited} of {num_tiles**2}; the causal mask hides the others")
print(f"scores alive at once: {module.TILE_Q * module.TILE_KV:,} a head, not {len(q) ** 2:,}")

# %% [markdown]
# ## What a tile saves
#
# A program reads its queries once, and every key and value that they see. So the larger the tile of queries, the fewer
# times the keys are read; the tile must fit on the chip, and that is the limit (an H100's multiprocessor has 228 KiB of
# shared memory). With tiles as small as 16 nothing is won: the keys are read so often that the scores would have cost less.

# %%
tile_sizes = np.array([16, 32, 64, 128, 256])
n = 16_384
reads = np.array([n * head_dim * 2 + (n / tile) * (n / 2) * 2 * head_dim for tile in tile_sizes]) * num_bytes
kept = np.array([(tile * head_dim * 2 + 2 * 64 * head_dim) * num_bytes + tile * head_dim * 4 for tile in tile_sizes])
_, axes = figure(6, 3)
axes.loglog(tile_sizes, reads / 2**20, marker="o", label="read from memory")
axes.axhline(4 * n * n * num_bytes / 2**20, color="#888888", ls="--", label="naive: scores, 4 trips")
axes.set(xlabel="queries in a tile", ylabel="MiB a head", title="16 K tokens, causal, head of 128, bf16")
axes.set_xticks(tile_sizes, [str(tile) for tile in tile_sizes])
axes.minorticks_off()
axes.legend(frameon=False, fontsize=9)
for tile, size in zip(tile_sizes, kept):
    print(f"{tile:4} queries a tile: {size / 1024:6.0f} KiB on the chip")

# %% [markdown]
# ## Exercises
#
# **1.** Two states, each from its own keys, can be put together: this is how decoding splits a long context over many
# programs. Write `merge(top_a, total_a, acc_a, top_b, total_b, acc_b)` that returns the output over both.


# %%
def merge(top_a, total_a, acc_a, top_b, total_b, acc_b):
    raise NotImplementedError


def state_of(keys):
    s = scores[keys]
    weights = np.exp(s - s.max())
    return s.max(), weights.sum(), weights @ v[keys, head // group]


halves = state_of(slice(0, 100)), state_of(slice(100, None))
check("Exercise 1", lambda: merge(*halves[0], *halves[1]), lambda: true)


# %% tags=["solution"]
def merge(top_a, total_a, acc_a, top_b, total_b, acc_b):
    top = max(top_a, top_b)
    scale_a, scale_b = np.exp(top_a - top), np.exp(top_b - top)
    return (scale_a * acc_a + scale_b * acc_b) / (scale_a * total_a + scale_b * total_b)


check("Exercise 1", lambda: merge(*halves[0], *halves[1]), lambda: true)

# %% [markdown]
# **2.** How many tiles does a causal run over `n` tokens visit if every query sees only the last `window` keys? Write
# `tiles_visited(n, window, tile)` for square tiles. (Query $i$ sees keys $i - window + 1$ to $i$.)


# %%
def tiles_visited(n, window, tile):
    raise NotImplementedError


def counted(n, window, tile):
    queries, keys = np.arange(n)[:, None], np.arange(n)[None, :]
    seen = (keys <= queries) & (keys > queries - window)
    pad = -n % tile
    blocks = np.pad(seen, ((0, pad), (0, pad))).reshape((n + pad) // tile, tile, (n + pad) // tile, tile)
    return int(blocks.any(axis=(1, 3)).sum())


cases = [(256, 256, 32), (256, 40, 32), (250, 33, 32), (250, 1, 16)]
check("Exercise 2", lambda: [tiles_visited(*case) for case in cases], lambda: [counted(*case) for case in cases])


# %% tags=["solution"]
def tiles_visited(n, window, tile):
    visited = 0
    for first in range(0, n, tile):
        last = min(first + tile, n) - 1
        visited += last // tile - max(0, first - window + 1) // tile + 1
    return visited


check("Exercise 2", lambda: [tiles_visited(*case) for case in cases], lambda: [counted(*case) for case in cases])

# %% [markdown]
# ## Where it fails
#
# - **Decoding.** One query against a long context has no row of queries to share the keys with: every key is read once
#   whatever the tile, and there is one row of tiles, so one program. The keys must be split over programs and the
#   states merged (exercise 1; [`split_paged_attention`](../ops/attention/paged_attention.md)).
# - **Short sequences.** Below a few hundred tokens the scores fit in a cache anyway, and there is little to win.
# - **NumPy.** Tiles are no nearer to the processor here than matrices are: the reference is slower tiled than dense. It
#   shows the order of the arithmetic, not the speed.
# - **Bits.** Another order of additions is another rounding: tiled and dense agree to rounding, not to the bit.
#
# ## Sources
#
# - Milakov and Gimelshein, *Online normalizer calculation for softmax*, 2018.
# - Rabe and Staats, *Self-attention does not need O(n²) memory*, 2021.
# - Dao et al., *FlashAttention*, 2022; Dao, *FlashAttention-2*, 2023: queries in the outer loop, as here.
