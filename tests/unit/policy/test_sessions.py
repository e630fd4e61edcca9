import pytest

from tailrace.policy import sessions
from tailrace.policy.routing import CostTerms, Preferred, Route
from tailrace.policy.sessions import EXPECT_S, SessionHints, session_key


def routed(prefill_id: str | None, *hashes: bytes) -> Route:
    terms = CostTerms("d0", prefill_id, 0.0, 0.0, 0.0, 0.0)
    return Route(terms, lambda: (terms,), hashes)


def expected(hints: SessionHints, *hashes: bytes, now_s: float = 0.0, **hits: int) -> dict[str, int]:
    hints.expect(b"key", hashes, hits, now_s)
    return hits


def test_keys_differ_by_tenant_and_are_of_one_length() -> None:
    keys = {session_key(*pair) for pair in (("a", ""), ("a", "b"), ("b", "a"), ("ab", ""), ("", "ab"), ("a" * 999, ""))}
    assert len(keys) == 6
    assert session_key("", "salt") == b""
    assert {len(key) for key in keys} == {0, 16}


def test_the_last_pair_is_remembered() -> None:
    hints = SessionHints()
    assert hints.preferred(b"key") is None
    hints.sent(b"key", routed("p1", b"x"), 0.0)
    hints.sent(b"key", routed("p2", b"x"), 0.0)
    assert hints.preferred(b"key") == Preferred("p2", "d0")
    hints.sent(b"key", routed(None, b"x"), 0.0)
    assert hints.preferred(b"key") == Preferred("", "d0")


def test_a_worker_is_taken_to_hold_what_it_was_just_sent() -> None:
    hints = SessionHints()
    hints.sent(b"key", routed("p1", b"x", b"y"), 0.0)
    assert expected(hints, b"x", b"y", b"z") == {"p1": 2}
    assert expected(hints, b"x", b"y", p1=1, p2=1) == {"p1": 2, "p2": 1}
    assert expected(hints, b"x", b"y", b"z", p1=3) == {"p1": 3}
    assert expected(hints, b"x", b"q", b"z") == {}, "the conversation went another way"
    assert expected(hints, b"x") == {}
    assert expected(hints, b"x", b"y", now_s=EXPECT_S + 1) == {}, "by now the index would know"


def test_sessions_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "MAX_SESSIONS", 2)
    hints = SessionHints()
    for key in (b"a", b"b", b"a", b"c"):
        hints.sent(key, routed("p1"), 0.0)
    assert len(hints) == 2
    assert [hints.preferred(key) is None for key in (b"a", b"b", b"c")] == [False, True, False]
