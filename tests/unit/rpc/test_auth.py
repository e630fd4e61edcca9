import pytest

from tailrace.rpc.auth import control_token, is_control_token, is_ticket, sign_ticket

NAMES = ("r", 1, "owner", 7)


def test_a_ticket_fits_exactly_what_it_was_signed_for() -> None:
    assert is_ticket(sign_ticket(b"s", *NAMES), b"s", *NAMES)


@pytest.mark.parametrize(
    "names", [("q", 1, "owner", 7), ("r", 2, "owner", 7), ("r", 1, "other", 7), ("r", 1, "owner", 8)]
)
def test_another_request_attempt_owner_or_life_needs_another_ticket(names: tuple[str, int, str, int]) -> None:
    assert not is_ticket(sign_ticket(b"s", *NAMES), b"s", *names)


def test_names_that_read_alike_side_by_side_are_kept_apart() -> None:
    assert sign_ticket(b"s", "ab", 1, "c", 7) != sign_ticket(b"s", "a", 1, "bc", 7)


def test_another_secret_signs_another_ticket_and_token() -> None:
    assert not is_ticket(sign_ticket(b"t", *NAMES), b"s", *NAMES)
    assert not is_ticket(b"", b"s", *NAMES)
    assert is_control_token(control_token(b"s"), control_token(b"s"))
    for presented in ("", "é", control_token(b"t"), control_token(b"s") + "0"):
        assert not is_control_token(control_token(b"s"), presented)
