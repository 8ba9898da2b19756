# %% [markdown]
# # Paging
#
# The memory of a sequence in blocks of a few tokens, taken when a token needs them, with a table that says where they
# are. What is wasted shrinks to the end of each last block, and two sequences can own the same past.
#
# ## The number that hurts
#
# A sequence's keys and values grow by one token a step, and nobody knows when it will end. An array that must lie in one
# piece is therefore reserved for the longest answer there could be. The paper that introduced paging measured what became
# of this in the systems of its day: **20.4 to 38.2 %** of the cache's memory held tokens. The rest was reserved.
#
# We can see it happen. The paper publishes the mean lengths of its conversations (ShareGPT: 161.31 tokens in, 337.99 out,
# at most 2,048) and the size of the cache (15.7 K tokens, for OPT-13B in 12 GB). It does not publish the lengths
# themselves: their shape here, log-normal, is our assumption.

# %%
from collections import deque

import numpy as np

from twofold.tutorial import body, check, figure, show

rng = np.random.default_rng(0)
most, num_slots = 2048, 15_700


def lengths_with_mean(mean, largest, count):
    """Log-normal lengths from 1 to ``largest``, scaled so that their mean after clipping is the one asked for."""
    shape, scale = rng.lognormal(sigma=1.0, size=count), mean
    for _ in range(50):
        scale *= mean / np.clip(scale * shape, 1, largest).mean()
    return np.clip(np.rint(scale * shape), 1, largest).astype(int)


prompts, answers = lengths_with_mean(161.31, most // 2, 300), lengths_with_mean(337.99, most // 2, 300)
requests = list(zip(prompts.tolist(), answers.tolist()))
print(f"300 requests: {prompts.mean():.2f} tokens in, {answers.mean():.2f} out")


# %% [markdown]
# All of them wait; a request is admitted as soon as a gap is long enough, and each step gives every running sequence a
# token. After each step every slot of the memory is one of four things: a token; reserved, and a token *later*; reserved,
# and *never* a token; or in a *gap* that no waiting request fits into.


# %%
def contiguous(reserve):
    """The mean share of each, if a request is given ``reserve(prompt, answer)`` slots in one piece, first fit."""
    waiting, running = deque(requests), []  # running: [start, room, prompt, answer, age], by start
    shares = []
    while waiting:
        start, place = 0, 0
        room = reserve(*waiting[0])
        while place <= len(running):
            stop = running[place][0] if place < len(running) else num_slots
            if stop - start >= room:
                running.insert(place, [start, room, *waiting.popleft(), 0])
                if not waiting:
                    return np.mean(shares, axis=0)
                start, place, room = 0, 0, reserve(*waiting[0])
            else:
                start, place = stop + (running[place][1] if place < len(running) else 0), place + 1
        for sequence in running:
            sequence[4] += 1
        _, rooms, prompt, answer, age = np.array(running).T
        counts = [prompt + age, answer - age, rooms - prompt - answer]
        counts = [count.sum() for count in counts]
        shares.append([*counts, num_slots - sum(counts), len(running)])
        running = [sequence for sequence in running if sequence[4] < sequence[3]]


policies = {
    "the longest possible": lambda prompt, answer: most,
    "the next power of two": lambda prompt, answer: prompt + (1 << (answer - 1).bit_length()),
    "an oracle's length": lambda prompt, answer: prompt + answer,
}
results = {name: contiguous(reserve) for name, reserve in policies.items()}
print("reserved                  tokens   later   never    gaps   the paper's tokens   running at once")
for (name, result), published in zip(results.items(), (20.4, 26.8, 38.2)):
    print(f"{name:24}" + "".join(f"{share / num_slots:8.1%}" for share in result[:4]), end="")
    print(f"{published:18} % {result[4]:17.1f}")

# %% [markdown]
# Even with an oracle, which no system has, nearly half is wasted: what is reserved at first is filled only by the last
# step. Our first row lands beside the paper's figure. In the other two rows pieces have many sizes, and there the paper
# assumes a buddy allocator, which leaves larger gaps than first fit. The story is the same: the card's memory is full, and
# holds little.
#
# ## The idea
#
# Operating systems had this problem with programs, and solved it with pages. A **block** holds the keys and values of a
# few tokens, 16 say. A sequence's **block table** says which block holds its tokens 0 to 15, which the next 16, and so on.
# The blocks lie anywhere. So any free block serves any sequence; nothing is reserved; and nothing is wasted but the end of
# each last block.
#
# And because a key and a value never change once written, sequences that begin alike can name the same blocks. Only a last
# block that is not full will be written again: whoever is about to write into one that others own too takes a fresh block
# and a copy. This is **copy-on-write**.

# %% tags=["hide"]
from matplotlib.patches import Rectangle

_, axes = figure(7, 3.7)
pool_of = {7: ("shared", 4), 1: ("a", 2), 3: ("b", 3), 4: ("c", 4), 6: ("c", 1)}
colors = {"shared": "#26486f", "a": "#c2571a", "b": "#5a8f3d", "c": "#bbbbbb"}
for block in range(8):
    y = 7 - block
    owner, filled = pool_of.get(block, ("", 0))
    for slot in range(4):
        color = colors[owner] if slot < filled else "#f3e3c3" if owner else "#f4f4f4"
        axes.add_patch(Rectangle((11 + slot, y + 0.08), 0.92, 0.84, color=color))
    axes.text(15.3, y + 0.5, str(block), va="center", color="#666666")
for top, name, table, color in ((5.2, "sequence A", (7, 1), "a"), (1.7, "sequence B", (7, 3), "b")):
    axes.text(0, top + 1.35, f"{name}: its table", color=colors[color])
    for index, block in enumerate(table):
        x = 0.2 + index * 2.2
        axes.add_patch(Rectangle((x, top), 1.9, 1, fill=False, edgecolor=colors[color], lw=1.5))
        axes.text(x + 0.95, top + 0.48, str(block), ha="center", va="center", color="#333333")
        bend = {"arrowstyle": "->", "color": colors["shared" if index == 0 else color], "lw": 1.3}
        rad = (-0.08 if top > 3 else 0.1) if index == 0 else 0
        start = (x + 0.95, top) if index == 0 else (x + 1.9, top + 0.5)
        axes.annotate("", (10.9, 7 - block + 0.5), start, arrowprops=bend | {"connectionstyle": f"arc3,rad={rad}"})
axes.text(13, 8.25, "the pool", ha="center", color="#666666")
axes.text(16.4, 6.5, "A's last block", va="center", color=colors["a"], fontsize=9)
axes.text(16.4, 4.5, "B's copy of it,\nand one token more", va="center", color=colors["b"], fontsize=9)
axes.text(16.4, 2.2, "grey: somebody else's", va="center", color="#888888", fontsize=9)
axes.text(16.4, 0.5, "shared: two owners", va="center", color=colors["shared"], fontsize=9)
axes.set(xlim=(-0.2, 22), ylim=(-0.7, 8.9))
axes.axis("off")
None

# %% [markdown]
# ## The code
#
# The reference itself. A pool knows which blocks are free, and how many owners each of the others has. (Blocks that are
# free but still findable by their contents belong to prefix caching; skip them on a first reading.)

# %%
from reference.kv_cache.block_pool import BlockPool
from reference.kv_cache.block_table import BlockTable

show(BlockPool.allocate, BlockPool.share, BlockPool.release)

# %% [markdown]
# A table turns positions into slots, grows by a block when it must, and forks:

# %%
show(BlockTable.append, BlockTable.slots, BlockTable.fork, BlockTable._must_copy)

# %% [markdown]
# None of this touches an array. A step hands the slots and the copies to two ops that do nothing else: the copies first,
# then the new keys and values. (Their contracts are on [their page](../ops/kv_cache/slots.md).)

# %%
import reference

body(reference.copy_blocks)

# %%
body(reference.write_kv)

# %% [markdown]
# And attention reads through the table. What a kernel does with pointers is one indexing here:

# %%
from reference.attention import paged_attention as paged_attention_module

show(paged_attention_module.gather_tokens)

# %% [markdown]
# ## The same requests, paged
#
# The same memory and the same queue, on this very pool and these very tables. A request is admitted when its prompt fits
# and one block in a hundred stays free. When the pool runs out all the same, the newest sequence gives its blocks back and
# waits, to be computed again.


# %%
def paged(block_size):
    """Mean counts of slots: tokens, empty ones in last blocks, free ones; sequences at once; and preemptions."""
    pool = BlockPool(num_slots // block_size)
    waiting, running = deque((prompt, prompt + answer) for prompt, answer in requests), []
    counts, num_preempted = [], 0
    while waiting:
        while waiting and -(-waiting[0][0] // block_size) <= pool.num_free - pool.num_blocks // 100:
            known, end = waiting.popleft()
            running.append((BlockTable(pool, block_size), end))
            running[-1][0].append(known)
        for table, _ in list(running):
            while table.num_tokens and table.blocks_needed(1) > pool.num_free:
                newest, its_end = running.pop()
                waiting.appendleft((newest.num_tokens, its_end))
                pool.release(newest.free())
                num_preempted += 1
            if table.num_tokens:  # not preempted just now
                table.append(1)
        tokens = sum(table.num_tokens for table, _ in running)
        counts.append(
            [tokens, pool.num_used * block_size - tokens, num_slots - pool.num_used * block_size, len(running)]
        )
        for table, end in running:
            if table.num_tokens >= end:
                pool.release(table.free())
        running = [(table, end) for table, end in running if table.num_tokens]
    return np.mean(counts, axis=0), num_preempted


(tokens, empty, free, at_once), num_preempted = paged(16)
print(f"tokens {tokens / num_slots:.1%}, empty in last blocks {empty / num_slots:.1%}, free {free / num_slots:.1%}")
print(f"{at_once:.1f} sequences at once, not {results['the longest possible'][4]:.1f}; {num_preempted} preemptions")
print("the paper measured 96.3 % tokens")

# %% tags=["hide"]
_, axes = figure(7, 2.9)
rows = [*((name, result[:4]) for name, result in results.items()), ("paged, blocks of 16", [tokens, 0, empty, free])]
kinds = [("tokens", "#26486f"), ("a token later", "#9cc3ea"), ("never a token", "#c2571a"), ("free", "#dddddd")]
for row, (_, counts) in enumerate(rows):
    left = 0
    for count, (kind, color) in zip(counts, kinds):
        axes.barh(row, count / num_slots * 100, left=left, color=color, label=kind if row == 0 else None, height=0.6)
        left += count / num_slots * 100
axes.set_yticks(range(len(rows)), [name for name, _ in rows])
axes.invert_yaxis()
axes.set(xlabel="% of the cache's slots, mean over the steps", xlim=(0, 100))
axes.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.35, 1.0), frameon=False, fontsize=9)
None

# %% [markdown]
# More sequences in the same memory are more sequences in each step, and a step is a trip through the model's weights that
# they all share ([the first tutorial](01_attention.md) measures what that is worth).
#
# ## A run on real data: a fork, watched
#
# Three samples of one answer from SmolLM2. The prompt is computed once; then the sequence forks. The engine's trace says
# which blocks each sample had at each step, and what was copied.

# %%
from twofold import LLM, SamplingParams

records = []
llm = LLM(max_model_len=512, num_blocks=128, trace=records.append)
prompt = llm.render("Name a colour, and say in one sentence what it makes you think of.")
(output,) = llm.generate(prompt, SamplingParams(n=3, temperature=0.6, seed=4, max_tokens=36, ignore_eos=True))
for sample in output.outputs:
    print(f"{sample.index}: {sample.text.strip().splitlines()[0][:90]}")

steps = [record for record in records if record["kind"] == "step"]
print(f"\nthe prompt: {len(prompt['prompt_token_ids'])} tokens")
before = None
for step in steps:
    tables = [sequence["blocks"][0] for sequence in step["sequences"]]
    if tables != before:
        print(f"step {step['step']:2}: tables {tables}", f"copies {step['copies'][0]}" if step["copies"][0] else "")
    before = tables

# %% [markdown]
# The prompt ends within a block. At step 1 all three are about to write there: the first two take a copy each, and by
# then the third is its only owner, and needs none. The full blocks of the prompt are never copied; three samples hold them
# once. What follows is each sample's own.

# %% tags=["hide"]
_, axes = figure(7, 3.2)
owners = np.zeros((max(max(s["blocks"][0]) for step in steps for s in step["sequences"]) + 1, len(steps)))
for column, step in enumerate(steps):
    for sequence in step["sequences"]:
        owners[sequence["blocks"][0], column] += 1
for count, color in ((1, "#9cc3ea"), (3, "#26486f")):
    y, x = np.nonzero(owners == count)
    axes.scatter(x, y, marker="s", s=24, color=color, label=f"{count} owner{'s' * (count > 1)}")
for column, step in enumerate(steps):
    for source, target in step["copies"][0]:
        arrow = {"arrowstyle": "->", "color": "#c2571a", "lw": 1.5, "connectionstyle": "arc3,rad=0.3"}
        axes.annotate("", (column, target), (column - 1, source), arrowprops=arrow)
axes.plot([], [], color="#c2571a", label="copied")
axes.set(xlabel="step", ylabel="block", title="three samples of one prompt", xlim=(-0.8, 24.5))
axes.set_yticks(range(len(owners)))
axes.legend(frameon=False, fontsize=9, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.22))
None

# %% [markdown]
# Is a copy what it should be? In the slots of the prompt, where nobody has written since, a copy and its source must agree
# to the bit, in every layer. After them each sample wrote its own tokens (alike only as
# long as they drew the same ones).

# %%
(source, target), *_ = next(step["copies"][0] for step in steps if step["copies"][0])
kept = len(prompt["prompt_token_ids"]) % llm.engine.config.block_size
for what, layer in (("first", 0), ("last", llm.checkpoint.config.num_layers - 1)):
    k_cache = llm.cache.arrays(layer)["k_cache"]
    same = [np.array_equal(k_cache[source, slot], k_cache[target, slot]) for slot in range(k_cache.shape[1])]
    print(f"{what} layer: equal in the {kept} slots of the prompt: {all(same[:kept])}; in the rest: {sum(same[kept:])}")

shared = steps[-1]["pools"][0]
alone = sum(len(sequence["blocks"][0]) for sequence in steps[-1]["sequences"])
print(f"blocks at the end: {shared['used']}, and {alone} if nothing were shared")

# %% [markdown]
# ## Which block size?
#
# A last block is on average half empty, so small blocks waste least. How much that is depends on how long the sequences
# are: here are the requests from above, and eight short questions to the real model, whose trace says how many tokens each
# sequence held at each step.

# %%
questions = [
    "What is the capital of France?",
    "Write a haiku about rain.",
    "What is 17 plus 25?",
    "Explain what a hash table is.",
    "Is a whale a fish?",
    "Translate 'good morning' into Spanish.",
    "Why do leaves change colour in autumn?",
    "Give me three uses for an old jar.",
]
records.clear()
llm.generate([llm.render(question) for question in questions], SamplingParams(temperature=0, max_tokens=24))
steps = [record for record in records if record["kind"] == "step"]
held = [[sequence["start"] + sequence["tokens"] for sequence in step["sequences"]] for step in steps]


def waste(lengths, block_size):
    """The share of slots that are empty, each sequence having blocks of its own."""
    lengths = np.concatenate([np.array(now) for now in lengths])
    slots = -(-lengths // block_size) * block_size
    return 1 - lengths.sum() / slots.sum()


sizes = [1, 2, 4, 8, 16, 32, 64, 128, 256]
real = [waste(held, size) for size in sizes]
lives = [np.arange(prompt, prompt + answer) + 1 for prompt, answer in requests]  # lengths over each one's life
paper = [waste(lives, size) for size in sizes]

_, axes = figure(7, 3.1)
axes.plot(sizes, np.multiply(paper, 100), marker="o", label="the paper's mean lengths")
axes.plot(sizes, np.multiply(real, 100), marker="o", label="eight short questions, SmolLM2")
axes.axvline(16, color="#bbbbbb", ls=":")
axes.set_xscale("log", base=2)
axes.set_xticks(sizes, [str(size) for size in sizes])
axes.set(xlabel="tokens in a block", ylabel="% of the used slots", title="empty slots in last blocks")
axes.legend(frameon=False, fontsize=9)
print(f"blocks of 16: {paper[4]:.1%} with the paper's lengths, {real[4]:.1%} with the short ones")

# %% [markdown]
# Why not blocks of one token, then, and no waste at all? A block is the unit of everything else. A kernel reads a block's
# tokens in one piece, and a table has an entry for each block: with blocks of one it would look up an address for every
# key. Blocks of 16 to 32 are where most engines settled.
#
# The engine counted for itself, in blocks of 16. It used fewer slots than the plot assumes: every prompt begins with the
# same system message, and the prefix cache let them share its blocks. The empty ends are everyone's own.

# %%
usage = [step["pools"][0] for step in steps]
blocks = sum(len(sequence["blocks"][0]) for step in steps for sequence in step["sequences"])
print("slots, summed over the steps      used    empty")
print(f"each with blocks of its own    {blocks * 16:7,}  {blocks * 16 - sum(map(sum, held)):7,}")
print(f"as the engine ran              {sum(u['slots'] for u in usage):7,}  {sum(u['empty_slots'] for u in usage):7,}")

# %% [markdown]
# ## Exercises
#
# **1.** Write `slots_of(block_ids, block_size, start, stop)`: the slots of positions `start` to `stop` of a sequence. A slot
# is `block * block_size + offset`.


# %%
def slots_of(block_ids, block_size, start, stop):
    raise NotImplementedError


def scattered(block_size):
    """A table of 50 tokens, in blocks that another sequence left in disorder."""
    pool = BlockPool(40)
    pool.release(np.random.default_rng(1).permutation(pool.allocate(40)).tolist())
    table = BlockTable(pool, block_size)
    table.append(50)
    return table


cases = [(scattered(16), 0, 50), (scattered(4), 7, 23), (scattered(3), 49, 50)]


def attempt():
    found = [slots_of(table.block_ids, table.block_size, start, stop) for table, start, stop in cases]
    return None if any(slots is None for slots in found) else np.concatenate(found)


def expected():
    return np.concatenate([table.slots(start, stop) for table, start, stop in cases])


check("Exercise 1", attempt, expected)


# %% tags=["solution"]
def slots_of(block_ids, block_size, start, stop):
    positions = np.arange(start, stop)
    return np.array(block_ids)[positions // block_size] * block_size + positions % block_size


check("Exercise 1", attempt, expected)

# %% [markdown]
# **2.** A prompt of `prompt` tokens is forked into `n` samples, and each gains `new` tokens (at least one). Write
# `blocks_held(prompt, n, new, block_size)`: how many blocks do they hold together, copies included?


# %%
def blocks_held(prompt, n, new, block_size):
    raise NotImplementedError


def counted(prompt, n, new, block_size):
    pool = BlockPool(1000)
    first = BlockTable(pool, block_size)
    first.append(prompt)
    for table in [first, *(first.fork() for _ in range(n - 1))]:
        table.append(new)
    return pool.num_used


forks = [(37, 3, 40, 16), (32, 3, 1, 16), (5, 4, 2, 16), (100, 1, 9, 8), (33, 6, 31, 4)]
check("Exercise 2", lambda: [blocks_held(*fork) for fork in forks], lambda: [counted(*fork) for fork in forks])


# %% tags=["solution"]
def blocks_held(prompt, n, new, block_size):
    full = prompt // block_size  # shared by all for good; the one that is not full ends up in n versions
    return full + n * (-(-(prompt + new) // block_size) - full)


check("Exercise 2", lambda: [blocks_held(*fork) for fork in forks], lambda: [counted(*fork) for fork in forks])

# %% [markdown]
# ## Where it fails
#
# - **Short sequences.** The paper's "under 4 % wasted" is a statement about long ones: half a block of 16 is little beside
#   400 tokens, and a good deal beside 40, as the plot shows.
# - **Every kernel must know.** Attention cannot be handed an array any more, only a pool and a table. A kernel that is fast
#   on arrays has to be written again, and its reads are gathers. Mapping pages with the GPU's own virtual memory keeps
#   arrays contiguous, at the price of much larger pages (2 MiB, unless the driver is changed).
# - **No reservation is no promise.** What was admitted may run out of memory, and somebody's work is thrown away or swapped:
#   the preemptions above. With reservations that cannot happen; nor can most of the batch.
# - **The host works every step.** Tables are bookkeeping between two steps of the model: small here, but on a fast GPU it
#   has to be hidden behind the step before.
# - **State that does not grow**, as in recurrent layers, has nothing to page.
#
# ## Sources
#
# - Kwon et al., *Efficient memory management for large language model serving with PagedAttention*, 2023: the figures
#   (sections 1 and 6), block tables (4.2), sharing and copy-on-write (4.4), block sizes (7.2).
# - Yu et al., *Orca: a distributed serving system for transformer-based generative models*, 2022: the reservations.
# - Prabhu et al., *vAttention: dynamic memory management for serving LLMs without PagedAttention*, 2024.
