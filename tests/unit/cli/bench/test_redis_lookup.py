"""The benchmark of lookups in Redis, against a real one."""

import contextlib
import json

from typer.testing import CliRunner

from tailrace.cli.main import app
from tests.helpers.redis_servers import RedisServer, redis_cluster


def test_it_measures_and_leaves_nothing():
    with RedisServer() as server:
        options = ["--hashes", "32", "--rounds", "5", "--workers", "2", "--json"]
        result = CliRunner().invoke(app, ["bench", "redis", "--redis", server.url, *options])
        assert result.exit_code == 0, result.output
        with contextlib.closing(server.client()) as client:
            assert client.dbsize() == 0
    told = json.loads(result.stdout)
    assert told["microseconds"].keys() == {"lookup", "get_asyncio", "get_blocking", "ping"}
    ratio = told["microseconds"]["lookup"]["median"] / told["microseconds"]["get_blocking"]["median"]
    assert abs(told["lookup_over"]["get_blocking"] - ratio) < 0.01


def test_on_a_cluster_it_says_so():
    with redis_cluster() as nodes:
        options = ["--hashes", "64", "--rounds", "3", "--json"]
        result = CliRunner().invoke(app, ["bench", "redis", "--redis", nodes[0].url, *options])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["is_cluster"]
    assert min(spread["median"] for spread in told["microseconds"].values()) > 0


def test_a_wrong_url_is_refused_without_repeating_it():
    result = CliRunner().invoke(app, ["bench", "redis", "--redis", "http://user:hunter2@host"])
    assert result.exit_code == 2
    assert "redis: must begin with redis:// or rediss://" in result.stderr
    assert "hunter2" not in result.output
