"""A process that fills a store file without end: `python -m tests.helpers.store_writer PATH [FILE_SIZE_LIMIT]`.

Prints a line for each chain that is on disk. With a limit (RLIMIT_FSIZE, counted from the data on), ends by itself when
the tier is off, and prints why.
"""

import resource
import sys
from itertools import count
from pathlib import Path

from tests.helpers.stores import PAGED, chain_of, make_store, num_found, put
from tests.helpers.values import make_layout


def main(path: Path, limit: int | None) -> None:
    store = make_store(path, slots=16, disk_slots=64, layout=make_layout(**PAGED))
    assert store.disk is not None
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    for number in count():
        chain = chain_of(f"chain{number}", 4)
        put(store, chain)
        store.flush(5.0)
        store.check_integrity()
        if not store.disk.is_on:
            break
        print(number, flush=True)
    print(store.disk.why_off)
    print(f"{num_found(store, chain)} of memory, {store.ledger().memory}", flush=True)
    store.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)
