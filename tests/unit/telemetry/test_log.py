import io
import json
import logging

import pytest

from tailrace.telemetry.log import configure_logging


@pytest.fixture(autouse=True)
def root_logger():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


def logged(style, emit, **options):
    stream = io.StringIO()
    configure_logging(role="decode", worker_id="decode-7", style=style, stream=stream, **options)
    emit(logging.getLogger("tailrace.test"))
    return stream.getvalue()


def test_text_names_the_worker_and_the_extra_fields():
    line = logged("text", lambda log: log.warning("pulled %d blocks", 3, extra={"transport": "nixl"}))
    assert line.endswith("WARNING decode-7 tailrace.test: pulled 3 blocks transport=nixl\n")


def test_json_is_one_object_a_line():
    line = logged("json", lambda log: log.info("two\nlines", extra={"num": 1}))
    fields = json.loads(line)
    assert (fields["role"], fields["worker"], fields["level"], fields["message"], fields["num"]) == (
        "decode", "decode-7", "info", "two\nlines", 1,
    )  # fmt: skip


@pytest.mark.parametrize("style", ["text", "json"])
def test_secrets_are_never_written_not_even_in_a_traceback(style):
    def emit(log):
        try:
            raise ValueError("key sk-12345678 is wrong")
        except ValueError:
            log.exception("refused sk-12345678")

    line = logged(style, emit, secrets=["sk-12345678"])
    assert "sk-12345678" not in line
    assert line.count("***") == 3  # the message, the source line and the error


def test_the_level_holds_and_libraries_stay_quiet():
    assert logged("text", lambda log: log.info("x"), level="warning") == ""
    assert logged("text", lambda log: logging.getLogger("httpx").info("GET /")) == ""
