"""What the compiled short way writes, byte for byte, and what it leaves alone."""

import logging
import os
import time
from array import array
from json.encoder import encode_basestring_ascii
from pathlib import Path

import pytest

from services.gateway.direct import framed
from services.gateway.http_metrics import TokenHistogram
from services.gateway.outlet import NUM_SLOTS, Board, Desk, TextChunk, load_step_writer
from tailrace.messages import TokenColumns
from tests.helpers.gateway_app import TOKENIZER, ids, step_writer
from tests.helpers.outlets import CHUNK, Body, Client

VOCABULARY = TOKENIZER.vocabulary


def is_plain(token_id: int) -> bool:
    text = VOCABULARY.text(token_id)
    return token_id not in VOCABULARY.special_ids and bool(text) and len(encode_basestring_ascii(text)) - 2 <= 31


PLAIN = [token_id for token_id in range(VOCABULARY.num_tokens) if is_plain(token_id)]
A, B = PLAIN[:2]


def columns(*rows: tuple[int, int, int, int]) -> TokenColumns:
    """(handle, choice, position, token) each."""
    made = TokenColumns()
    for row in rows:
        made.add(*row, None)
    return made


def test_every_plain_token_is_written_as_the_whole_way_would() -> None:
    client = Client(TextChunk(b'data: {"text":', b"}\n\n"))
    for position, token in enumerate(PLAIN):
        client.outlet.expect(position)
        assert client.outlet.take(position, token)
        text = encode_basestring_ascii(VOCABULARY.text(token) or "").encode()
        assert client.read() == framed(b'data: {"text":' + text + b"}\n\n")
        client.outlet.collect()


def test_parts_of_characters_and_long_special_and_unknown_tokens_are_left() -> None:
    client = Client()
    others = sorted({*range(VOCABULARY.num_tokens), 1 << 20, (1 << 32) - 1} - set(PLAIN))
    assert len(others) > 100
    for token in others:
        assert not client.outlet.take(0, token)
    assert client.read() == b""
    assert client.outlet.collect() == []


def test_only_the_token_whose_turn_it_is_is_taken_and_only_while_it_is_open() -> None:
    client = Client()
    outlet = client.outlet
    outlet.expect(7)
    assert [outlet.take(position, A) for position in (6, 8, 7, 7)] == [False, False, True, False]
    outlet.close()
    assert not outlet.take(8, B)
    outlet.open(time.monotonic())
    assert outlet.take(8, B)
    assert client.tokens() == [A, B]
    assert outlet.collect() == [A, B]
    assert (outlet.num_new(), outlet.num_new()) == (2, 0)


def test_gaps_are_counted_as_by_the_histogram_itself() -> None:
    client = Client()
    for position, ago_s in enumerate((0.1, 0.499, 3.0, 9.0, 11.0, 1e6)):
        client.outlet.open(time.monotonic() - ago_s)
        assert client.outlet.take(position, A)
    assert client.icl.counts == array("Q", (2, 2, 2))
    assert client.icl.sum[0] == pytest.approx(1e6 + 23.6, abs=0.5)
    assert client.outlet.wrote_at == pytest.approx(time.monotonic(), abs=5)


def test_a_full_socket_leaves_the_token_and_loses_none() -> None:
    client = Client(send_buffer=4608)
    taken = []
    for token in PLAIN * 50:
        if not client.outlet.take(len(taken), token):
            break
        taken.append(token)
        client.outlet.collect()
    assert 2 < len(taken) < len(PLAIN) * 50
    assert client.tokens() == taken
    assert client.outlet.take(len(taken), A), "it goes on from where it was left"


def test_a_client_that_has_left_leaves_the_token() -> None:
    client = Client()
    client.far.close()
    assert not client.outlet.take(0, A)


@pytest.mark.parametrize("sent", [1, 2, 3, 5])
def test_what_the_socket_did_not_take_is_left_to_the_connection(sent: int) -> None:
    client = Client()
    assert client.outlet.settle(sent, A)
    assert client.body.rests == [framed(CHUNK.of(VOCABULARY.text(A) or ""))[sent:]]


def test_a_step_of_many_answers_goes_to_each_its_own() -> None:
    clients = [Client() for _ in range(40)]
    board = Board(step_writer())
    for handle, client in enumerate(clients, start=1):
        board.connect(handle, client.outlet)
    tokens = {handle: PLAIN[handle] for handle in range(1, 41)}
    rows = [(handle, 0, 0, token) for handle, token in tokens.items()]
    rows += [(handle, 0, 1, B) for handle in tokens]
    assert board.write(columns(*rows)) == []
    assert [client.tokens() for client in clients] == [[token, B] for token in tokens.values()]


def test_a_board_returns_the_rows_that_nobody_took() -> None:
    client = Client()
    board = Board(step_writer())
    board.connect(5, client.outlet)
    rows = [(5, 0, 0, A), (5, 0, 3, A), (5, 1, 1, A), (6, 0, 1, A), (5, 0, 1, B), (5 + NUM_SLOTS, 0, 2, A)]
    step = columns(*rows)
    assert board.write(step) == [1, 2, 3, 5]
    assert not any(board.is_settled(row, step.handles[row], step.token_ids[row]) for row in (1, 2, 3, 5))
    assert client.tokens() == [A, B]
    assert board.write(TokenColumns()) == []


def test_of_two_handles_with_one_place_the_first_keeps_it() -> None:
    first, second = Client(), Client()
    board = Board(step_writer())
    board.connect(5, first.outlet)
    board.connect(5 + NUM_SLOTS, second.outlet)
    assert board.write(columns((5, 0, 0, A), (5 + NUM_SLOTS, 0, 0, A))) == [1]
    board.disconnect(5 + NUM_SLOTS)
    board.disconnect(5)
    board.disconnect(5)
    assert board.write(columns((5, 0, 1, A))) == [0]
    board.connect(5 + NUM_SLOTS, second.outlet)
    assert board.write(columns((5 + NUM_SLOTS, 0, 0, A))) == []
    assert (first.tokens(), second.tokens()) == ([A], [A])


def test_an_outlet_that_moved_to_another_worker_is_deaf_to_the_first() -> None:
    client = Client()
    old, new = Board(step_writer()), Board(step_writer())
    old.connect(5, client.outlet)
    new.connect(6, client.outlet)
    assert old.write(columns((5, 0, 0, A))) == [0]
    assert new.write(columns((6, 0, 0, A))) == []


def test_an_encrypted_connection_and_long_chunks_have_none() -> None:
    desk = Desk(step_writer(), VOCABULARY, TokenHistogram("icl", "gaps", (1.0,)))
    assert desk.outlet(Body(None), CHUNK) is None  # type: ignore[arg-type]
    assert desk.outlet(Body(0), TextChunk(b"x" * 719, b"")) is None  # type: ignore[arg-type]
    longest = Client(TextChunk(b"x" * 700, b"y" * 18))
    assert longest.outlet.take(0, A)
    assert len(longest.chunks()[0]) == 720 + len(VOCABULARY.text(A) or "")


def test_without_a_compiler_there_is_none_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert load_step_writer(tmp_path) is None
    assert "the short way of streamed tokens is off" in caplog.text
    assert "install gcc or clang" in caplog.text


def test_what_is_remembered_has_a_limit() -> None:
    client = Client()
    for position, token in enumerate([*PLAIN[:64], *PLAIN[:64]]):
        assert client.outlet.take(position, token)
        client.read()
    assert not client.outlet.take(128, A)
    assert len(client.outlet.collect()) == 128
    assert client.outlet.take(128, A)
    assert client.outlet.num_new() == 129


def test_the_socket_stays_the_answer_s_own_when_its_number_is_given_away() -> None:
    """A body keeps a descriptor of its own: a connection that is closed gives its number to the next one."""
    client = Client()
    own = os.dup(client.near.fileno())
    try:
        client.outlet.struct.fd = own
        client.near.close()
        assert client.outlet.take(0, A)
        assert client.tokens() == [A]
    finally:
        os.close(own)


def test_texts_of_a_sentence() -> None:
    client = Client()
    sentence = ids("the cat sat on the mat")
    taken = [token for position, token in enumerate(sentence) if client.outlet.take(position, token)]
    assert client.tokens() == taken == sentence
