"""Text as it streams: everything is shown once, in order, and nothing of a stop string ever is."""

from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.text import TextStream


class Characters:
    """A detokenizer whose tokens are code points."""

    def push(self, token_ids):
        return "".join(map(chr, token_ids))

    def flush(self):
        return ""


letters = st.text(alphabet="ab\n", max_size=40)


def cut(text: str, places: list[int]) -> list[str]:
    """The text in pieces."""
    ends = sorted({min(place, len(text)) for place in places} | {len(text)})
    return [text[start:end] for start, end in zip([0, *ends], ends)]


def streamed(text, places, stop):
    stream = TextStream(Characters(), stop)
    shown = [stream.push([ord(c) for c in piece]) for piece in cut(text, places)]
    shown.append(stream.push([], last=True))
    return stream, "".join(shown)


@given(letters, st.lists(st.integers(0, 40)), st.text(alphabet="ab\n", min_size=1, max_size=5))
@settings(max_examples=200)
def test_one_stop_string_cuts_the_text_where_it_first_occurs(text, places, stop):
    """However the text is cut into tokens, what is shown is what stands before the stop string."""
    stream, shown = streamed(text, places, [stop])
    assert shown == text.partition(stop)[0]
    assert shown == stream.text
    assert (stream.stopped_by == stop) == (stop in text)


@given(letters, st.lists(st.integers(0, 40)), st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3))
@settings(max_examples=200)
def test_no_stop_string_is_ever_shown(text, places, stop):
    """With several stop strings none is shown, not even a beginning that turns out to be one."""
    stream, shown = streamed(text, places, stop)
    assert not any(s in shown for s in stop)
    assert text.startswith(shown)
    if stream.stopped_by is None:
        assert shown == text
    else:
        assert text[len(shown) :].startswith(stream.stopped_by)


@given(letters, st.lists(st.integers(0, 40)))
def test_text_is_held_back_no_longer_than_needed(text, places):
    """Without stop strings every piece is shown at once."""
    stream = TextStream(Characters())
    for piece in cut(text, places):
        assert stream.push([ord(c) for c in piece]) == piece
