import asyncio
import json
import os
import signal

import pytest

from tailrace.cli.bench.run import measure_and_show, show


def _table(result):
    print("table of", result["rate"])


@pytest.mark.parametrize("as_json", [False, True])
def test_a_result_is_shown_as_a_table_or_as_one_json_object(as_json, capsys):
    show({"rate": 2.5}, _table, as_json=as_json)
    shown = capsys.readouterr().out
    assert (json.loads(shown) == {"rate": 2.5}) if as_json else (shown == "table of 2.5\n")


def test_what_was_measured_is_shown(capsys):
    async def measure():
        return {"rate": 4.0}

    measure_and_show(measure(), _table, as_json=False)
    assert capsys.readouterr().out == "table of 4.0\n"


def test_a_failed_measurement_raises_and_shows_nothing(capsys):
    async def measure():
        raise ValueError("no rate")

    with pytest.raises(ValueError, match="no rate"):
        measure_and_show(measure(), _table, as_json=True)
    assert capsys.readouterr().out == ""


def test_a_measurement_that_a_signal_ends_shows_nothing(capsys):
    async def measure():
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.Event().wait()

    measure_and_show(measure(), _table, as_json=False)
    assert capsys.readouterr().out == ""
