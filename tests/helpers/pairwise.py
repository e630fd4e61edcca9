"""Few cases that still meet every pair of values."""

import random
from collections.abc import Sequence
from itertools import combinations, product
from typing import Any

Case = tuple[Any, ...]


def pairwise(*columns: Sequence[Any]) -> list[Case]:
    """Rows with a value of each column: any two values of two columns meet in some row. Greedy; always the same."""
    missing = {
        (left, right, a, b)
        for left, right in combinations(range(len(columns)), 2)
        for a, b in product(range(len(columns[left])), range(len(columns[right])))
    }
    draw = random.Random(1)
    cases = []
    while missing:
        left, right, a, b = min(missing)
        chosen = {left: a, right: b}
        for column in range(len(columns)):
            if column not in chosen:
                values = draw.sample(range(len(columns[column])), len(columns[column]))
                chosen[column] = max(values, key=lambda value: _gain(missing, chosen, column, value))
        missing -= {(x, y, chosen[x], chosen[y]) for x, y in combinations(range(len(columns)), 2)}
        cases.append(tuple(values[chosen[column]] for column, values in enumerate(columns)))
    return cases


def _gain(missing: set[tuple[int, int, int, int]], chosen: dict[int, int], column: int, value: int) -> int:
    pairs = ((min((column, value), other), max((column, value), other)) for other in chosen.items())
    return sum((low[0], high[0], low[1], high[1]) in missing for low, high in pairs)
