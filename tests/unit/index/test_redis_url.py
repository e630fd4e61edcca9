"""Where Redis is, as users write it."""

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
        ("redis://u:hunter2@h:1?db=1", "option db is for rediss:// only"),
        ("rediss://u:hunter2@h:1?password=x", "unknown option password; known are ssl_ca_certs"),
        ("rediss://u:hunter2@h:1?ssl_ca_certs=/no/such", "option ssl_ca_certs: no such file"),
        ("rediss://u:hunter2@h:1?ssl_cert_reqs=maybe", "option ssl_cert_reqs must be required or none"),
        ("redis://u:hunter2@" + ",".join(f"h{n}" for n in range(17)), "names 17 nodes; at most 16"),
    ],
)
def test_what_is_wrong_is_said_without_the_password(text, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")) as refusal:
        RedisUrl.parse(text)
    assert "hunter2" not in str(refusal.value)
