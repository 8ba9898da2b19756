"""Graphs of lifetimes: what a plan of memory is made for."""

from hypothesis import strategies as st

from reference.memory.planner import Lifetime

SIZES = st.one_of(st.integers(0, 12), st.sampled_from([1, 10, 100, 1000]))


@st.composite
def graphs(draw: st.DrawFn) -> list[Lifetime]:
    """Tensors of a few ops: some wanted briefly, some long; several of one op; some that may be written over."""
    tensors = st.tuples(SIZES, st.integers(0, 9), st.sampled_from([1, 0, 2, 5]), st.booleans())
    lifetimes: list[Lifetime] = []
    for num_bytes, first, span, in_place in sorted(draw(st.lists(tensors, max_size=16)), key=lambda tensor: tensor[1]):
        readable = [i for i, other in enumerate(lifetimes) if other.first < first <= other.last]
        over = readable[-1] if in_place and readable else None
        num_bytes = num_bytes if over is None or first % 2 else lifetimes[over].num_bytes
        lifetimes.append(Lifetime(num_bytes, first, first + span, over))
    return lifetimes


@st.composite
def chains(draw: st.DrawFn) -> list[Lifetime]:
    """Each tensor is read by the op that makes the next, and then not any more; or is read by none."""
    tensors = draw(st.lists(st.tuples(SIZES, st.sampled_from([1, 1, 1, 0])), max_size=20))
    return [Lifetime(num_bytes, op, op + span) for op, (num_bytes, span) in enumerate(tensors)]
