import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.stop import StopFinder


def naive(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """Reads a character at a time and looks at what has been read."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return (text[:end] if include else text[: end - len(stop)]), stop
    return text, None


def run(parts: list[str], stops: list[str], *, include: bool = False) -> tuple[list[str], str | None]:
    finder = StopFinder(stops, include=include)
    return [*map(finder.feed, parts), finder.flush()], finder.found


letters = st.text("ab\n", max_size=6)


@given(st.lists(letters, max_size=8), st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3), st.booleans())
def test_equals_the_naive_reading_however_the_text_is_cut(parts: list[str], stops: list[str], include: bool) -> None:
    shown, found = run(parts, stops, include=include)
    assert ("".join(shown), found) == naive("".join(parts), stops, include)


@given(st.lists(letters, max_size=8), st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3))
def test_holds_back_only_what_may_begin_a_stop(parts: list[str], stops: list[str]) -> None:
    finder = StopFinder(stops)
    read = shown = ""
    for part in parts:
        read, shown = read + part, shown + finder.feed(part)
        if finder.found is None:
            held = read[len(shown) :]
            starts = [read[i:] for i in range(len(read) + 1) if any(stop.startswith(read[i:]) for stop in stops)]
            assert held == max(starts, key=len, default="")


@pytest.mark.parametrize(
    ("parts", "stops", "shown"),
    [
        (["Hello\n", "\nworld"], ["\n\n"], "Hello"),
        (["ab", "cd"], ["bcx", "c"], "ab"),  # complete first wins
        (["xab"], ["b", "ab"], "x"),  # the longest of those that end together
        (["aaab"], ["aab"], "a"),  # a false start inside a match
        (["STO", "RM"], ["STOP"], "STORM"),
        (["STO"], ["STOP"], "STO"),
    ],
)
def test_examples(parts: list[str], stops: list[str], shown: str) -> None:
    assert "".join(run(parts, stops)[0]) == shown


def test_nothing_follows_a_stop() -> None:
    assert run(["a.b", "c"], ["."]) == (["a", "", ""], ".")
