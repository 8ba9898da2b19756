"""A trace as a picture: who was in the batch at each step, and what the blocks of the pool were used for.

The picture is one SVG file that needs nothing else, and follows the reader's light or dark setting.
"""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

Record = dict[str, Any]

LEFT, RIGHT, TOP = 120, 20, 60
LANE, GAP = 14, 4
POOL_HEIGHT = 160
WIDTH = 960
MOST_LANES = 60  # more requests than this share the last lane's height budget: lanes get thinner instead
LEAST_LANE = 3

STYLE = """
  text { font: 12px system-ui, sans-serif; fill: #333 }
  .title { font-weight: 600; font-size: 14px } .small { font-size: 10px; fill: #666 }
  .axis { stroke: #bbb; stroke-width: 1 } .paper { fill: #fff }
  .prefill { fill: #3b6fb6 } .decode { fill: #9cc3ea } .draft { fill: #b48ad6 } .preempted { fill: #d1495b }
  .private { fill: #9cc3ea } .shared { fill: #3b6fb6 } .empty { fill: #f2b134 }
  .limit { stroke: #d1495b; stroke-dasharray: 4 3 }
  @media (prefers-color-scheme: dark) {
    text { fill: #ddd } .small { fill: #999 } .axis { stroke: #555 } .paper { fill: #1e2129 }
    .decode, .private { fill: #40699a } .prefill, .shared { fill: #8fbaf0 }
  }
"""


def draw(records: Sequence[Record]) -> str:
    """The SVG of a trace, as `reference.batching.trace.read_trace` gives it."""
    config = records[0]["config"]
    steps = [record for record in records if record["kind"] == "step"]
    requests = list(dict.fromkeys(record["request"] for record in records if record["kind"] == "add"))
    scale = (WIDTH - LEFT - RIGHT) / max(len(steps), 1)
    lane = max(LEAST_LANE, min(LANE, LANE * MOST_LANES / max(len(requests), 1)))
    batch_height = max(len(requests), 1) * (lane + GAP * lane / LANE)
    pool_top = TOP + batch_height + 70
    height = pool_top + POOL_HEIGHT + 50

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img">',
        f"<title>A trace of {len(requests)} requests over {len(steps)} steps</title><style>{STYLE}</style>",
        f'<rect class="paper" width="{WIDTH}" height="{height:.0f}"/>',
        _text(LEFT, 22, "The batch: what each request computed at each step", "title"),
        _legend(
            LEFT, 40, [("prefill", "prompt"), ("decode", "decoding"), ("draft", "drafts"), ("preempted", "preempted")]
        ),
        *_lanes(steps, requests, scale, lane),
        _text(
            LEFT, pool_top - 38, f"The pool: {config['num_blocks']} blocks of {config['block_size']} tokens", "title"
        ),
        _legend(
            LEFT, pool_top - 20, [("private", "one owner"), ("shared", "shared"), ("empty", "empty slots of them")]
        ),
        *_pool(steps, config, scale, pool_top),
        _axis(steps, scale, pool_top + POOL_HEIGHT),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _lanes(steps: Sequence[Record], requests: Sequence[str], scale: float, lane: float) -> Iterable[str]:
    """A lane a request; in it a box for each step that computed something of it."""
    pitch = lane + GAP * lane / LANE
    top = {request: TOP + number * pitch for number, request in enumerate(requests)}
    if lane >= 9:
        yield from (_text(LEFT - 8, y + lane - 3, request[:16], "small", anchor="end") for request, y in top.items())
    for x, step in enumerate(steps):
        seen: dict[str, list[Record]] = {}
        for sequence in step["sequences"]:
            seen.setdefault(sequence["request"], []).append(sequence)
        for request, sequences in seen.items():
            if request in top:
                what = f"step {step['step']}, {request}: {_describe(sequences)}"
                yield _box(LEFT + x * scale, top[request], scale, lane, _kind(sequences), what)
        for request in step["preempted"]:
            if request in top:
                yield _box(LEFT + x * scale, top[request], max(scale, 2), lane, "preempted", f"{request}: preempted")


def _kind(sequences: Sequence[Record]) -> str:
    if any(sequence["drafts"] for sequence in sequences):
        return "draft"
    return "prefill" if any(sequence["tokens"] > 1 for sequence in sequences) else "decode"


def _describe(sequences: Sequence[Record]) -> str:
    return "; ".join(
        f"sample {s['sample']}: {s['tokens']} token{'s' * (s['tokens'] != 1)} from position {s['start']}"
        for s in sequences
    )


def _pool(steps: Sequence[Record], config: Record, scale: float, top: float) -> Iterable[str]:
    """Bars a step: blocks with several owners below, those with one above them, and the empty slots of all on top."""
    most = max([1, *(step["pools"][0]["used"] for step in steps)])
    unit = POOL_HEIGHT / most
    bottom = top + POOL_HEIGHT
    for x, step in enumerate(steps):
        usage = step["pools"][0]
        empty = usage["empty_slots"] / config["block_size"]
        full = usage["used"] - usage["shared"] - empty
        what = (
            f"step {step['step']}: {usage['used']} blocks, {usage['shared']} shared, {usage['empty_slots']} empty slots"
        )
        y = bottom
        for kind, blocks in (("shared", usage["shared"]), ("private", max(full, 0.0)), ("empty", empty)):
            y -= blocks * unit
            if blocks:
                yield _box(LEFT + x * scale, y, scale, blocks * unit, kind, what)
    yield _text(LEFT - 8, top + 10, f"{most} blocks", "small", anchor="end")
    if most == config["num_blocks"]:
        yield f'<line class="limit" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{top}" y2="{top}"/>'


def _axis(steps: Sequence[Record], scale: float, y: float) -> str:
    """Steps, and the seconds since the first of them."""
    parts = [f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>']
    every = max(1, len(steps) // 8)
    for x in range(0, len(steps), every):
        seconds = steps[x]["time"] - steps[0]["time"]
        parts.append(_text(LEFT + x * scale, y + 16, f"step {steps[x]['step']}", "small"))
        parts.append(_text(LEFT + x * scale, y + 30, f"{seconds:.2f} s", "small"))
    return "".join(parts)


def _legend(x: float, y: float, entries: Sequence[tuple[str, str]]) -> str:
    parts = []
    for kind, label in entries:
        parts.append(
            f'<rect class="{kind}" x="{x}" y="{y - 9}" width="10" height="10"/>{_text(x + 14, y, label, "small")}'
        )
        x += 28 + 7 * len(label)
    return "".join(parts)


def _text(x: float, y: float, text: str, kind: str, *, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _box(x: float, y: float, width: float, height: float, kind: str, what: str) -> str:
    gap = min(1.0, width * 0.15)
    return (
        f'<rect class="{kind}" x="{x:.2f}" y="{y:.2f}" width="{width - gap:.2f}" height="{height:.2f}">'
        f"<title>{escape(what)}</title></rect>"
    )
