"""Where Redis is, as users write it."""

import re

import pytest

from tailrace.index.redis_url import RedisUrl


def test_all_parts_are_read(tmp_path):
    file = tmp_path / "ca.pem"
    file.touch()
    url = RedisUrl.parse(f"rediss://me:p%40ss%2F@h1:7000,[::1]:7001,h3/2?ssl_ca_certs={file}&ssl_check_hostname=false")
    assert url == RedisUrl(
        nodes=(("h1", 7000), ("::1", 7001), ("h3", 6379)),
        tls=True,
        db=2,
        username="me",
        password="p@ss/",
        tls_options=(("ssl_ca_certs", str(file)), ("ssl_check_hostname", "false")),
    )
    assert url.address == "h1:7000,::1:7001,h3:6379"
    assert "p@ss" not in repr(url)
    assert RedisUrl.parse("redis://localhost") == RedisUrl((("localhost", 6379),))
    assert RedisUrl.parse("redis://:only-a-password@h:1").password == "only-a-password"


def test_sentinels_are_named_with_their_service(tmp_path):
    file = tmp_path / "ca.pem"
    file.touch()
    url = RedisUrl.parse("redis+sentinel://me:secret1@h1,h2:5000/my-master/2?sentinel_password=secret2")
    assert url == RedisUrl(
        nodes=(("h1", 26379), ("h2", 5000)),
        db=2,
        username="me",
        password="secret1",
        service="my-master",
        sentinel_password="secret2",
    )
    assert url.address == "h1:26379,h2:5000/my-master"
    assert "secret" not in repr(url)
    tls = RedisUrl.parse(f"rediss+sentinel://h/m?ssl_ca_certs={file}&sentinel_username=u")
    assert (tls.tls, tls.tls_options, tls.sentinel_username, tls.db) == (True, (("ssl_ca_certs", str(file)),), "u", 0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "must begin with redis://"),
        ("http://hunter2@h", "must begin with redis://"),
        ("unix:///tmp/hunter2", "must begin with redis://"),
        ("redis://", "must name a host"),
        ("redis://u:hunter2@", "must name a host"),
        ("redis://u:hunter2@h:0", "the port must be a number from 1 to 65535"),
        ("redis://u:hunter2@h:65536", "the port must be"),
        ("redis://u:hunter2@h:x", "the port must be"),
        ("redis://u:hunter2@::1:6379", "must name a host"),
        ("redis://u:hunter2@h:1/x", "the path must be the number of a database"),
        ("redis://u:hunter2@h:1/99999999", "the path must be"),
        ("redis://u:hunter2@h:1?db=1", "unknown option db; known are none"),
        ("rediss://u:hunter2@h:1?password=x", "unknown option password; known are ssl_ca_certs"),
        ("rediss://u:hunter2@h:1?ssl_ca_certs=/no/such", "option ssl_ca_certs: no such file"),
        ("rediss://u:hunter2@h:1?ssl_cert_reqs=maybe", "option ssl_cert_reqs must be required or none"),
        ("redis+sentinel://u:hunter2@h:1", "must name the service that the Sentinels watch"),
        ("redis+sentinel://u:hunter2@h:1/a b", "must name the service"),
        ("redis+sentinel://u:hunter2@h:1/m/x", "the path must be the number of a database"),
        ("redis+sentinel://h/m?sentinel_pass=hunter2", "unknown option sentinel_pass; known are sentinel_username"),
        ("redis://h?sentinel_password=hunter2", "unknown option sentinel_password"),
        ("rediss+sentinel://h/m?password=hunter2", "unknown option password; known are ssl_ca_certs"),
        ("redis://h?ssl_cert_reqs=none", "option ssl_cert_reqs is for rediss:// only"),
        ("sentinel://u:hunter2@h/m", "must begin with redis:// or rediss://, or with redis+sentinel://"),
        ("redis://u:hunter2@" + ",".join(f"h{n}" for n in range(17)), "names 17 nodes; at most 16"),
    ],
)
def test_what_is_wrong_is_said_without_the_password(text, words):
    with pytest.raises(ValueError, match=re.escape(words)) as refusal:
        RedisUrl.parse(text)
    assert "hunter2" not in str(refusal.value)
