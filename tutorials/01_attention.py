# %% [markdown]
# # Attention, and why decoding is slow
#
# What attention computes, what the KV cache saves, and why a machine that multiplies a trillion numbers a second still
# writes one word at a time: measured here, on the machine that built this page.
#
# ## The number that hurts
#
# A model of 135 million parameters does 270 million operations for a token: a multiplication and an addition for each
# parameter. How fast could this machine do that, and how fast does it?

# %%
import time

import numpy as np

from reference.linear.linear import linear
from twofold.tutorial import body, check, figure, show


def seconds(run, repeat=7):
    """The fastest of several runs: what the machine can do when nobody else wants it."""
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


rng = np.random.default_rng(0)
matrix = rng.normal(size=(2048, 2048)).astype(np.float32)
flops = 2 * 2048**3 / seconds(lambda: matrix @ matrix)

large, target = np.ones(1 << 26, np.float32), np.empty(1 << 26, np.float32)
bandwidth = 2 * large.nbytes / seconds(lambda: np.copyto(target, large))
del large, target

num_parameters = 134_515_008
print(f"this machine: {flops / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.1f} GB/s")
print(f"operations of a token:  {2 * num_parameters / flops * 1e3:6.1f} ms")
print(f"reading the parameters: {4 * num_parameters / bandwidth * 1e3:6.1f} ms")

# %% [markdown]
# The arithmetic of a token would be done many times over while its parameters are still on their way from memory. To
# decode is to read: every parameter, and every key and value of the text so far, for every token.
#
# ## The idea
#
# A query asks, every key answers with a score, and the values are averaged by the softmax of the scores:
#
# $$out_i = \sum_{j \le i} \frac{e^{q_i \cdot k_j \, scale}}{\sum_{l \le i} e^{q_i \cdot k_l \, scale}} \; v_j$$
#
# A token's key and value depend on that token and those before it. They never change again: so they are computed once and
# kept. This is the **KV cache**, and it makes two very different jobs of one formula:
#
# - **prefill**: the prompt's tokens are all known. Their queries meet the keys together, as a product of matrices: what is
#   read once is used many times.
# - **decode**: one query at a time, because the next token depends on this one. What is read is used once.
#
# Query heads may share a key and a value head. With as many KV heads as query heads it is **MHA**, with one **MQA**,
# between **GQA**; the cache shrinks by as much, and each key that is read serves a whole group of queries.

# %% tags=["hide"]
_, axes = figure(7, 2.6, columns=3, sharey=True)
for ax, (name, groups) in zip(axes, [("MHA", 6), ("GQA", 2), ("MQA", 1)]):
    heads = np.arange(6)
    ax.scatter(heads, np.ones(6), s=120, marker="s", color="#26486f")
    kv = (np.arange(groups) + 0.5) * 6 / groups - 0.5
    ax.scatter(kv, np.zeros(groups), s=120, marker="s", color="#c2571a")
    for head in heads:
        ax.plot([head, kv[head * groups // 6]], [0.93, 0.07], color="#bbbbbb", lw=1, zorder=0)
    ax.set_title(f"{name}: {groups} KV head{'s' * (groups > 1)}", fontsize=11)
    ax.axis("off")
    ax.set(xlim=(-0.7, 5.7), ylim=(-0.3, 1.3))
axes[0].text(-0.6, 1.18, "query heads", fontsize=9, color="#26486f")
axes[0].text(-0.6, -0.27, "key and value heads", fontsize=9, color="#c2571a")
None

# %% [markdown]
# ## The code
#
# The reference itself (the contract is on [its page](../ops/attention/dense_attention.md)). `group_heads` puts the query heads that share a KV head into one matrix, so that GQA is one
# product for each KV head and no key is ever repeated.

# %%
from reference.attention import dense_attention as module

show(module.attention_scores, module.group_heads, module.ungroup_heads, module.visible_keys)

# %%
body(module.dense_attention)

# %% [markdown]
# ## A run on real data: the roofline
#
# A computation that does $F$ operations on $B$ bytes takes at least $\max(F / flops, \; B / bandwidth)$. What decides is
# $F / B$, its **arithmetic intensity**: below the machine's own ratio of the two, memory is what one waits for.
#
# Here are the layers of SmolLM2 with 1, 8, 64 and 512 tokens at once, and its attention in prefill and in decode, in
# operations a second as measured.

# %%
ridge = flops / bandwidth
points = []
weights = [rng.normal(size=(3072, 576)).astype(np.float32) for _ in range(16)]  # more than the processor's caches hold
for num_tokens in (1, 8, 64, 512):
    x = rng.normal(size=(num_tokens, 576)).astype(np.float32)
    taken = seconds(lambda x=x: [linear(x, weight) for weight in weights], repeat=5) / len(weights)
    operations = 2 * num_tokens * 576 * 3072
    moved = 4 * (576 * 3072 + num_tokens * (576 + 3072))
    points.append((f"linear, {num_tokens}", operations / moved, operations / taken, "#26486f"))

for name, num_queries, num_keys in (("prefill, 512", 512, 512), ("decode, 4096", 1, 4096)):
    q = rng.normal(size=(num_queries, 9, 64)).astype(np.float32)
    caches = [rng.normal(size=(2, num_keys, 3, 64)).astype(np.float32) for _ in range(8)]
    taken = seconds(lambda q=q, caches=caches: [module.dense_attention(q, *cache) for cache in caches], repeat=3) / 8
    operations = 4 * num_queries * num_keys * 9 * 64 / (2 if num_queries > 1 else 1)
    moved = 4 * (2 * q.size + caches[0].size)
    points.append((name, operations / moved, operations / taken, "#c2571a"))

_, axes = figure(7, 3.8)
intensity = np.geomspace(0.2, 500, 100)
axes.loglog(intensity, np.minimum(flops, intensity * bandwidth) / 1e9, color="#888888")
for name, x, y, color in points:
    axes.scatter(x, y / 1e9, color=color, zorder=3)
    axes.annotate(name, (x, y / 1e9), textcoords="offset points", xytext=(6, -10), fontsize=9, color=color)
axes.axvline(ridge, color="#bbbbbb", ls=":")
axes.set(xlabel="operations for each byte read or written", ylabel="GFLOP/s", title="the roofline of this machine")
axes.minorticks_off()
for name, x, y, _ in points:
    print(
        f"{name:14}  {x:7.1f} operations a byte   {y / 1e9:7.1f} GFLOP/s   {y / min(flops, x * bandwidth):5.0%} of the roof"
    )

# %% [markdown]
# Left of the dotted line memory decides, right of it arithmetic. A linear layer with one token sits at half an operation a
# byte, whatever the model; with 512 it is far to the right. **Batching** moves linear layers along this line, and that is
# why engines batch. It does not move attention in decode: every sequence has keys of its own. There only a smaller cache
# helps: fewer KV heads, or fewer bits.
#
# What a token of known models keeps in the cache, in bf16:

# %%
print("model             layers  heads  KV heads    bytes a token    at 32 K tokens")
for name, layers, heads, kv_heads, size in (
    ("SmolLM2-135M", 30, 9, 3, 64),
    ("Llama-2-13B", 40, 40, 40, 128),
    ("Llama-3.1-8B", 32, 32, 8, 128),
    ("Qwen3-0.6B", 28, 16, 8, 128),
):
    cost = layers * 2 * kv_heads * size * 2
    print(f"{name:18}{layers:5}{heads:7}{kv_heads:10}{cost:17,}{cost * 32768 / 2**30:14.1f} GiB")

# %% [markdown]
# And the whole model, through the engine: the first token of a long prompt against the tokens after it.

# %%
from twofold import LLM, SamplingParams

llm = LLM(max_model_len=640)
prompt = {"prompt_token_ids": rng.integers(100, 40_000, 512).tolist()}
(output,) = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=16, ignore_eos=True))
prefill, between = output.metrics.time_to_first_token, output.metrics.time_between_tokens
print(f"prefill: 512 tokens in {prefill:.2f} s, {512 / prefill:.0f} tokens a second")
print(f"decode:  {between * 1e3:.0f} ms a token, {1 / between:.0f} tokens a second")
print(f"the roof for decode, from the bytes alone: {bandwidth / (4 * num_parameters):.0f} tokens a second")

# %% [markdown]
# ## Exercises
#
# **1.** How many sequences must be decoded together before a linear layer stops waiting for memory, on a machine with
# `flops` and `bandwidth`, with weights of `num_bytes` each? (Ignore the activations' bytes: they are few.)


# %%
def batch_at_the_ridge(flops, bandwidth, num_bytes):
    raise NotImplementedError


machines = [(flops, bandwidth, 4), (989e12, 3.35e12, 2), (989e12, 3.35e12, 0.5)]  # this one; an H100 in bf16, in 4 bits
check(
    "Exercise 1", lambda: [batch_at_the_ridge(*m) for m in machines], lambda: [f * b / (2 * w) for f, w, b in machines]
)


# %% tags=["solution"]
def batch_at_the_ridge(flops, bandwidth, num_bytes):
    # A weight is read once, num_bytes, and used for 2 operations a sequence: 2 * batch / num_bytes = flops / bandwidth.
    return flops * num_bytes / (2 * bandwidth)


check(
    "Exercise 1", lambda: [batch_at_the_ridge(*m) for m in machines], lambda: [f * b / (2 * w) for f, w, b in machines]
)
print(
    f"an H100 in bf16: {batch_at_the_ridge(*machines[1]):.0f} sequences; with weights of 4 bits {batch_at_the_ridge(*machines[2]):.0f}"
)

# %% [markdown]
# **2.** The cache without which decoding would be quadratic. Write `decode_step(q, k, v, cache_k, cache_v)`: one token's
# query, key and value, each `[1, heads, head_dim]`, and the caches so far, `[n, kv_heads, head_dim]`. Return the output,
# and leave no key of the past to be computed again.


# %%
def decode_step(q, k, v, cache_k, cache_v):
    raise NotImplementedError


def decoded(step):
    """All tokens of a small sequence, one at a time."""
    q, k, v = (np.random.default_rng(i).normal(size=(9, heads, 8)) for i, heads in enumerate((4, 2, 2)))
    return np.concatenate([step(q[i : i + 1], k[i : i + 1], v[i : i + 1], k[:i], v[:i]) for i in range(9)]), (q, k, v)


def attempt():
    return decoded(decode_step)[0]


def expected():
    q, k, v = (np.random.default_rng(i).normal(size=(9, heads, 8)) for i, heads in enumerate((4, 2, 2)))
    return module.dense_attention(q, k, v)


check("Exercise 2", attempt, expected)


# %% tags=["solution"]
def decode_step(q, k, v, cache_k, cache_v):
    # The causal mask is aligned at the end: one query sees all keys, its own included.
    return module.dense_attention(q, np.concatenate([cache_k, k]), np.concatenate([cache_v, v]))


check("Exercise 2", attempt, expected)

# %% [markdown]
# ## Where it fails
#
# - **The roofline is a bound, not a forecast.** Small matrices do not reach either roof: a call has a cost of its own, and
#   a core alone may not fill the memory bus. The table above says by how much.
# - **Batching is not free.** It trades the time of one answer for the throughput of all, and every sequence's cache must
#   fit in memory: with long contexts the cache, not the model, is what is read.
# - **GQA changes the model.** Heads can be merged after training (`reference/model/gqa_conversion.py`), but without
#   training on, quality is lost.
#
# ## Sources
#
# - Vaswani et al., *Attention is all you need*, 2017.
# - Shazeer, *Fast transformer decoding: one write-head is all you need*, 2019 (MQA); Ainslie et al., *GQA*, 2023.
# - Williams, Waterman and Patterson, *Roofline: an insightful visual performance model*, 2009.
# - Pope et al., *Efficiently scaling transformer inference*, 2022.
