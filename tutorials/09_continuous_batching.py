# %% [markdown]
# # Continuous batching
#
# Requests join and leave the batch at every step, so no row computes for nothing and nobody waits for a stranger's long
# answer. And a long prompt is computed in chunks, beside those who are decoding.
#
# ## The number that hurts
#
# A step of decoding reads the whole model, for one sequence or for many ([why](01_attention.md)). So sequences are computed
# together, in a batch. A **static** batch is made of what waits, and ends with its longest answer. But answers differ, and
# nobody knows by how much before they end: a row that is done goes on being computed, for nothing, until the last one is.

# %%
import numpy as np

from twofold.tutorial import check, figure, show

rng = np.random.default_rng(0)
print("rows   share of the rows' work that is wasted, for log-uniform answers of 8 to 256 tokens")
for slots in (1, 4, 8, 32, 128):
    lengths = np.exp(rng.uniform(np.log(8), np.log(256), (2000, slots)))
    print(f"{slots:4}   {1 - lengths.mean() / lengths.max(axis=1).mean():.0%}")

# %% [markdown]
# The larger the batch, the surer it has a long answer in it, and the more rows wait for that one. Batching was meant to make
# use of the machine; with 32 rows two thirds of the work is thrown away. It also hurts those who are not in it: a request
# that comes a moment too late waits for the whole batch to end.
#
# ## The idea
#
# The batch is nothing that lasts. It is made anew **at every step**: whoever has ended leaves, and whoever waits takes the
# place at once. Nothing in a model objects: linear layers take rows and do not ask whose they are, and attention reads each
# sequence's keys through [its own block table](06_paging.md). A step's tokens lie end to end, without padding: some
# sequences bring one token (they decode), some many (a prompt, or a piece of one).

# %% tags=["hide"]
from matplotlib.patches import Rectangle

_, (left, right) = figure(7, 2.7, columns=2, sharey=True)
lengths = [3, 8, 5, 2, 6, 4, 2, 3]
colors = ["#26486f", "#c2571a", "#5a8f3d", "#8d5ba6", "#4d8fcc", "#e0a030", "#7fb069", "#b48ad6"]
for ax, name in ((left, "static"), (right, "continuous")):
    free_at = [0] * 4
    for number, length in enumerate(lengths):
        if name == "static" and number == 4:
            for row, at in enumerate(free_at):
                ax.add_patch(Rectangle((at, 3 - row), max(free_at) - at, 0.85, color="#e5e5e5"))
            free_at = [max(free_at)] * 4
        row = number if name == "static" and number < 4 else free_at.index(min(free_at))
        row = number % 4 if name == "static" else row
        ax.add_patch(Rectangle((free_at[row], 3 - row), length, 0.85, color=colors[number]))
        ax.text(free_at[row] + length / 2, 3 - row + 0.4, "ABCDEFGH"[number], ha="center", va="center", color="white")
        free_at[row] += length
    if name == "static":
        for row, at in enumerate(free_at):
            ax.add_patch(Rectangle((at, 3 - row), max(free_at) - at, 0.85, color="#e5e5e5"))
    ax.set(xlim=(0, 14.2), ylim=(-0.1, 4), title=f"{name}: {max(free_at)} steps", xlabel="step", xticks=range(0, 15, 2))
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
left.text(5.6, 3.4, "computed for nothing", ha="center", va="center", fontsize=8, color="#666666")
None

# %% [markdown]
# ## The code
#
# The reference itself, in pieces. The engine's loop is four lines: schedule a batch, launch it, read its result, update the
# sequences. This is the first of them:

# %%
from reference.batching.scheduler import Scheduler

show(Scheduler.schedule)

# %% [markdown]
# Who is running goes on. Those who decode come first, a token each, and after them the prompts that are half computed. A
# sequence that decodes is the common case and has a short way (`_decode_one`); the rest goes through `_schedule`.

# %%
show(Scheduler._go_on)

# %% [markdown]
# What the step's token budget has left goes to those who wait, oldest first, while there are rows and memory. There is no
# batch to be closed here, and none to wait for:

# %%
show(Scheduler._admit)

# %% [markdown]
# The budget is where prompts become chunks. `left` is what the step can still take; a prompt gets as much of it as it
# wants, and comes again in the next step if that was not all:

# %%
show(Scheduler._wanted)

# %% [markdown]
# The static scheduler, to compare with, is the same one, with two things changed. A request may be admitted only when
# nobody is running; and who has ended stays, and is computed on:

# %%
from reference.batching.static_batching import StaticScheduler

show(StaticScheduler._may_admit, StaticScheduler._close_batch, StaticScheduler._go_on)

# %% [markdown]
# ## A run on real data
#
# Twelve questions to SmolLM2, in four rows, both ways. The answers are greedy and end where the model ends them, or at 32
# tokens: some are a word, some would be an essay.

# %%
from dataclasses import replace

from reference.batching.engine import Engine
from reference.batching.request import Request
from twofold import LLM, SamplingParams

questions = [
    "What is the capital of France? Answer with one word.",
    "Explain what a hash table is.",
    "Is a whale a fish? Answer yes or no.",
    "What is 2 plus 2?",
    "Name one planet.",
    "Who wrote Hamlet?",
    "Tell me a story about a fox.",
    "Say hello in Spanish.",
    "What colour is grass?",
    "Why is the sky blue?",
    "How many days has a week?",
    "Name a fruit.",
]
llm = LLM(max_model_len=1024, num_blocks=160)
prompts = [llm.render(question)["prompt_token_ids"] for question in questions]


def run(scheduler_type, requests, late=(), late_at=0, **settings):
    """Requests through an engine of their own, some of them added only before step ``late_at``.

    Returns the steps of the trace, the whole trace, and the outputs by the request's name.
    """
    config = replace(llm.engine.config, enable_prefix_caching=False, **settings)
    trace, outputs = [], {}
    engine = Engine(config, llm.engine.runner, scheduler=scheduler_type(config), trace=trace.append)
    for request in requests:
        engine.add(request)
    num_steps = 0
    while engine.has_unfinished():
        if num_steps == late_at:
            for request in late:
                engine.add(request)
        outputs |= {output.request_id: output for output in engine.step().finished}
        num_steps += 1
    return [record for record in trace if record["kind"] == "step"], trace, outputs


def asked():
    """The questions, as new requests."""
    greedy = SamplingParams(temperature=0, max_tokens=32)
    return [Request(f"question {number}", prompt, greedy) for number, prompt in enumerate(prompts, start=1)]


static_steps_run, _, static_outputs = run(StaticScheduler, asked(), max_num_seqs=4)
steps, trace, outputs = run(Scheduler, asked(), max_num_seqs=4)
names = [request.request_id for request in asked()]
lengths = [len(outputs[name].outputs[0].token_ids) for name in names]
same = [outputs[name].outputs[0].token_ids == static_outputs[name].outputs[0].token_ids for name in names]
print("tokens of the answers:", *lengths)
print(f"the same answers both ways: {sum(same)} of {len(same)}")

# %% [markdown]
# The picture that `twofold trace` draws: who was in the batch at each step, and what they held. A row ends, and the next
# request begins in the very next step.

# %%
from IPython.display import SVG

from twofold.trace_svg import draw

SVG(draw(trace))

# %% [markdown]
# The same run seen from its four rows, and the static one under it, to the same scale. Grey is what was computed for
# nothing.

# %% tags=["hide"]
_, axes = figure(7, 3.4)


def draw_rows(steps, base):
    """A box for every row of every step."""
    row_of, ended = {}, set()
    for x, step in enumerate(steps):
        present = [sequence["request"] for sequence in step["sequences"]]
        row_of = {name: row for name, row in row_of.items() if name in present}
        for name in present:
            if name not in row_of:
                row_of[name] = min(set(range(4)) - set(row_of.values()))
                axes.text(
                    x + 0.4, base - row_of[name] + 0.4, name.split()[-1], va="center", fontsize=8, color="#111111"
                )
            color = "#e5e5e5" if name in ended else ("#9cc3ea", "#f2b98a", "#b5d3a1", "#d3bfe0")[names.index(name) % 4]
            axes.add_patch(Rectangle((x, base - row_of[name]), 1.02, 0.85, color=color, zorder=0, lw=0))
        ended |= {gained["request"] for gained in step["output"] if gained["finish_reason"]}


draw_rows(steps, 8)
draw_rows(static_steps_run, 3)
axes.set(xlim=(0, len(static_steps_run) + 1), ylim=(-0.2, 9.2), xlabel="step")
axes.set_yticks([1.9, 6.9], ["static", "continuous"])
axes.tick_params(axis="y", length=0)
axes.spines["left"].set_visible(False)
None

# %% [markdown]
# How many steps that must be follows from the lengths alone: a static batch lasts as long as its longest answer; in a
# continuous one a row takes the next request as soon as it is free.

# %%
from twofold.bench.cpu import continuous_steps, static_steps

show(static_steps, continuous_steps)

# %%
print("              steps from the lengths   steps run   steps to the first token, mean")
for name, expected, ran in (
    ("static", static_steps(lengths, 4), static_steps_run),
    ("continuous", continuous_steps(lengths, 4), steps),
):
    first = {}
    for number, step in enumerate(ran, start=1):
        for gained in step["output"]:
            first.setdefault(gained["request"], number)
    print(f"{name:11}{expected:25}{len(ran):12}{np.mean(list(first.values())):33.1f}")
print(f"ratio{static_steps(lengths, 4) / continuous_steps(lengths, 4):31.2f}{len(static_steps_run) / len(steps):12.2f}")

# %% [markdown]
# The steps agree to the last one. We count steps here because a page is built on a machine that does other things too;
# `twofold bench cpu` takes the seconds, with eight rows and forty-eight requests.
#
# ## Chunks: the long prompt that comes in between
#
# Now three are decoding, and a long prompt arrives. Computed whole, its step is a long one, and the three who decode wait for
# it: their readers see the text stop. With a small token budget it is computed in chunks, and each step has room for the
# three as well.

# %%
from reference.batching import scheduler as scheduler_module

long_prompt = llm.render("Summarize this: " + scheduler_module.__doc__)["prompt_token_ids"]
budgets = {}
for budget in (512, 64):
    decoding = [
        Request(name, prompt, SamplingParams(temperature=0, max_tokens=18, ignore_eos=True))
        for name, prompt in zip("abc", prompts)
    ]
    late = [Request("long", long_prompt, SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))]
    ran, _, _ = run(Scheduler, decoding, late, late_at=6, max_num_batched_tokens=budget)
    budgets[budget] = ran

print(f"the long prompt: {len(long_prompt)} tokens")
print("budget   its chunks           longest gap between tokens for the others   its first token")
_, axes = figure(7, 3.2)
for (budget, ran), color in zip(budgets.items(), ("#c2571a", "#26486f")):
    chunks = [s["tokens"] for step in ran for s in step["sequences"] if s["request"] == "long" and s["tokens"] > 1]
    times = np.array(
        [step["time"] for step in ran if any(s["request"] == "a" and s["tokens"] == 1 for s in step["sequences"])]
    )
    gaps = np.diff(times)
    shown = f"{len(chunks)} of up to {max(chunks)}"
    print(f"{budget:6}   {shown:20} {gaps.max() * 1e3:38.0f} ms   after {len(chunks)} step{'s' * (len(chunks) > 1)}")
    axes.plot(times[1:] - times[0], gaps * 1e3, color=color, marker="o", ms=3, lw=1, label=f"budget {budget}")
axes.set(xlabel="seconds", ylabel="ms since the last token", title="what the reader of a decoding sequence sees")
axes.legend(frameon=False, fontsize=9)
None

# %% [markdown]
# One long stop, or several short delays. The budget is the knob between the two. A small one keeps the gaps small, but the
# prompt pays for it: every chunk reads the model's weights, and all keys before it, once more. The smaller the chunks, the
# later the prompt's own first token.
#
# ## Latency against throughput
#
# A continuous batch is as large as there are requests, up to `max_num_seqs`. How large should it be? Here are steps in which
# 1 to 16 sequences decode: the time of a step is what each of them waits for its next token, and the sequences divided by
# it are the machine's tokens a second.

# %%
points = []
for num_seqs in (1, 2, 4, 8, 16):
    one_each = [
        Request(
            str(i), rng.integers(100, 40_000, 8).tolist(), SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
        )
        for i in range(num_seqs)
    ]
    ran, _, _ = run(Scheduler, one_each, max_num_seqs=32)
    points.append((num_seqs, np.min([step["launch_time"] + step["wait_time"] for step in ran[1:]])))

_, axes = figure(7, 3.2)
counts, step_times = np.array(points).T
axes.plot(counts / step_times, step_times * 1e3, marker="o")
for count, seconds in points:
    axes.annotate(f"{count}", (count / seconds, seconds * 1e3), textcoords="offset points", xytext=(-4, 8), fontsize=9)
axes.set(xlabel="tokens a second, all together", ylabel="ms a token, for each", title="sequences in a step")
axes.set_ylim(0)
for count, seconds in points:
    print(f"{count:3} sequences: {seconds * 1e3:5.0f} ms a step, {count / seconds:5.0f} tokens a second")

# %% [markdown]
# To the right is more throughput, to the top more latency. While reading the weights is what a step waits for, another row
# is nearly free, and the curve runs flat. Where arithmetic decides, it turns up: more rows only make everybody slower. On a
# processor that begins with a few rows, on a GPU after hundreds. A good batch is near the bend; and a queue in front of it
# is better than rows past it, because those who wait at least do not slow down the others.
#
# ## Exercises
#
# **1.** A prompt of `prompt` tokens arrives while `decoding` sequences decode, with a token budget of `budget` (larger than
# `decoding`). Write `steps_to_first_token(prompt, decoding, budget)`: in how many steps is its first token there?


# %%
def steps_to_first_token(prompt, decoding, budget):
    raise NotImplementedError


from reference.batching.config import EngineConfig
from reference.batching.runner import StepResult


class Instant:
    """A runner without a model: token 7 for everyone, at once."""

    vocab_size = 100

    def launch(self, batch):
        self.num_drawn = batch.sampling.num_drawn
        return self

    def result(self):
        return StepResult(np.full(self.num_drawn, 7))


def counted(prompt, decoding, budget):
    """What the scheduler does."""
    engine = Engine(EngineConfig(num_blocks=500, max_model_len=2048, max_num_batched_tokens=budget), Instant())
    for i in range(decoding):
        engine.add(Request(f"other {i}", [1], SamplingParams(max_tokens=1000)))
    engine.step()
    engine.add(Request("late", [1] * prompt, SamplingParams(max_tokens=2)))
    num_steps = 1
    while not any(gained.request_id == "late" for gained in engine.step().sequences):
        num_steps += 1
    return num_steps


cases = [(400, 3, 512), (400, 3, 64), (61, 3, 64), (62, 3, 64), (100, 31, 32)]
check("Exercise 1", lambda: [steps_to_first_token(*case) for case in cases], lambda: [counted(*case) for case in cases])


# %% tags=["solution"]
def steps_to_first_token(prompt, decoding, budget):
    # Who decodes comes first, a token each; the prompt gets what is left. Its last chunk draws its first token.
    return -(-prompt // (budget - decoding))


check("Exercise 1", lambda: [steps_to_first_token(*case) for case in cases], lambda: [counted(*case) for case in cases])

# %% [markdown]
# **2.** Write `wasted(steps)`: of all rows that a trace's steps computed, the share that gave nobody a token. (A step has
# `step["sequences"]`, what was computed, and `step["output"]`, what was gained. There are no chunks in these two traces.)


# %%
def wasted(steps):
    raise NotImplementedError


def from_lengths():
    rows = sum(len(lengths[i : i + 4]) * max(lengths[i : i + 4]) for i in range(0, len(lengths), 4))
    return [1 - sum(lengths) / rows, 0.0]


def attempt():
    found = [wasted(static_steps_run), wasted(steps)]
    return None if None in found else found


check("Exercise 2", attempt, from_lengths)


# %% tags=["solution"]
def wasted(steps):
    return 1 - sum(len(step["output"]) for step in steps) / sum(len(step["sequences"]) for step in steps)


check("Exercise 2", attempt, from_lengths)
print(f"static: {wasted(static_steps_run):.0%} of the rows for nothing; continuous: {wasted(steps):.0%}")

# %% [markdown]
# ## Where it fails
#
# - **Equal lengths.** If all answers end together (embeddings, classification, a fixed number of tokens), there is nothing to
#   win, and a static batch is simpler.
# - **It needs paging.** A row that is taken again and again by sequences of unknown length needs memory that is handed out in
#   the same way. And with memory taken as it goes, it can run out: somebody is preempted, and computes twice.
# - **The step pays for its longest part.** A mixed step is one launch: those who decode wait for the chunk beside them.
#   Chunks bound that wait, they do not remove it. Systems that must promise both latencies compute prompts and answers on
#   different machines.
# - **The end.** When nobody waits any more, rows fall empty as before: the last long answer runs alone, as in the picture.
# - **The host is in the loop** at every step: schedule, pack, read. On a fast GPU that must be hidden behind the step before
#   (`lookahead`), or it is what one waits for.
#
# ## Sources
#
# - Yu et al., *Orca: a distributed serving system for transformer-based generative models*, 2022: scheduling by iteration.
# - Kwon et al., *Efficient memory management for large language model serving with PagedAttention*, 2023: with paged memory
#   and preemption.
# - Agrawal et al., *Taming throughput-latency tradeoff in LLM inference with Sarathi-Serve*, 2024: chunked prefill.
# - Zhong et al., *DistServe: disaggregating prefill and decoding for goodput-optimized LLM serving*, 2024: the other way.
