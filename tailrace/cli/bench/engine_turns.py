"""The engine alone as a process that works only when asked, for `tailrace bench overhead`.

Run as `python -m tailrace.cli.bench.engine_turns`. The first line on stdin says what to load; each line after it is a
list of prompts, and is answered by a line of JSON once all of them are continued.
"""

import json
import os
import sys
from pathlib import Path

from tailrace.cli.bench.engine_loop import EngineLoop, LoopOptions
from tailrace.cli.processes import answer, claim_stdout
from tailrace.errors import TailraceError


def main() -> None:
    order = json.loads(sys.stdin.readline())
    answers = claim_stdout()
    os.sched_setaffinity(0, order["cores"])
    try:
        loop = EngineLoop(LoopOptions(Path(order["model_dir"]), **order["options"]))
    except TailraceError as error:
        sys.exit(error.message)
    answer(answers, {"ready": True})
    for line in sys.stdin:
        times = loop.generate(json.loads(line), order["output_tokens"])
        answer(answers, {"wall_s": times.wall_s, "output_tokens": times.output_tokens})


if __name__ == "__main__":
    main()
