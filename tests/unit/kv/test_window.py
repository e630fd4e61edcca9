"""Which blocks are needed under a window, against counting them one by one."""

import random

import pytest

from tailrace.kv.block_pool import BlockPool
from tailrace.kv.layout import KVLayout, LayerGroup
from tailrace.kv.window import LeadingBlocks, Window
from tailrace.policy.sequence import Sequence
from tests.helpers.decode_world import make_request

SIZES = [(window, block) for window in (1, 2, 3, 4, 5, 8, 13, 48) for block in (1, 4, 16)]


def seen(window: Window, position: int) -> list[int]:
    """Blocks that the token at `position` attends to."""
    first = max(0, position - window.tokens + 1) if window.tokens else 0
    return sorted({at // window.block_size for at in range(first, position + 1)})


@pytest.mark.parametrize(("tokens", "block_size"), [*SIZES, (0, 4)])
def test_the_first_block_that_is_needed(tokens: int, block_size: int) -> None:
    window = Window(tokens, block_size)
    for position in range(200):
        assert window.first_needed(position) == seen(window, position)[0]
        assert window.first_handed_over(position + 1) == seen(window, position)[0]


@pytest.mark.parametrize(("tokens", "block_size"), SIZES)
@pytest.mark.parametrize("num_ahead", [1, 5, 16])
def test_the_most_blocks_that_are_held(tokens: int, block_size: int, num_ahead: int) -> None:
    window = Window(tokens, block_size)
    for num_tokens in (1, 30, 200):
        spans = [
            seen(window, min(num_tokens, at + num_ahead) - 1)[-1] - seen(window, at)[0] + 1 for at in range(num_tokens)
        ]
        assert window.most_held(num_tokens, num_ahead) >= max(spans)
    assert window.most_held(200, num_ahead) == max(spans)


def test_what_is_let_go_of_is_let_go_of_once() -> None:
    window, sequence = Window(8, 4), Sequence(make_request(1, [1], block_size=4), (0,), [1], [], [7, 3, 9, 5])
    assert window.let_go(sequence, 10) == []
    assert window.let_go(sequence, 11) == [7]
    assert window.let_go(sequence, 11) == []
    assert window.let_go(sequence, 4) == []
    assert (window.let_go(sequence, 19), sequence.held) == ([3, 9], [5])
    assert (window.let_go(sequence, 100), sequence.held) == ([5], [])
    assert sequence.blocks == [7, 3, 9, 5]


def test_without_a_window_nothing_is_let_go_of() -> None:
    window, sequence = Window(0, 4), Sequence(make_request(1, [1], block_size=4), (0,), [1], [], [7, 3])
    assert window.let_go(sequence, 1000) == []
    assert window.most_held(1000, 4) == window.least_held(1000) == 250


@pytest.mark.parametrize("seed", range(40))
def test_the_longest_prefix_that_can_be_gone_on_from(seed: int) -> None:
    rng = random.Random(seed)
    window, pool = Window(rng.choice((0, 1, 5, 8, 9, 12, 30)), 4), BlockPool(32, epoch=1)
    hashes = [bytes([at]) * 16 for at in range(rng.randint(0, 20))]
    there = dict(enumerate(pool.allocate(len(hashes)) or ()))
    for gone in rng.sample(sorted(there), rng.randint(0, min(3, len(there)))):
        del there[gone]
    for at, block in there.items():
        pool.register(block, hashes[at])
    found = window.find(pool, hashes)
    fitting = [
        depth
        for depth in range(len(hashes) + 1)
        if all(at in there for at in range(window.first_needed(depth * 4), depth))
    ]
    assert len(found) == max(fitting)
    assert found.num_gone == min(len(found), window.first_needed(len(found) * 4))
    assert found.needed == [there[at] for at in range(found.num_gone, len(found))]
    assert all(0 <= block < pool.num_blocks for block in found.blocks)


def test_nothing_found_is_an_empty_table() -> None:
    assert Window(8, 4).find(BlockPool(2, epoch=1), [b"a", b"b"]) == LeadingBlocks()


@pytest.mark.parametrize(
    ("groups", "window"),
    [
        ((LayerGroup("full", (0, 1)),), 0),
        ((LayerGroup("sliding_window", (0, 1), 48),), 48),
        ((LayerGroup("full", (0,)), LayerGroup("sliding_window", (1,), 48)), 0),
    ],
)
def test_a_layout_has_a_window_where_all_its_layers_have_it(groups: tuple[LayerGroup, ...], window: int) -> None:
    layout = KVLayout("m", "w", "none", 1, 2, 1, 8, 16, "float32", groups)
    assert layout.window == window
