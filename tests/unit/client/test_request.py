"""What a caller may write, and what becomes of it."""

from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from tailrace.client import Client
from tailrace.client.request import GenerateOptions, make_request
from tailrace.errors import ConfigError, InvalidRequestError
from tailrace.inference import ChatMessage, ChatPrompt, GenerateRequest, SamplingOptions, TextPrompt, TokenPrompt
from tailrace.rpc.convert_inference import request_from_proto, request_to_proto

HELLO = ChatMessage("user", "hello")


@pytest.mark.parametrize(
    ("given", "prompt"),
    [
        ("hello", TextPrompt("hello")),
        ("", TextPrompt("")),
        ([1, 2], TokenPrompt((1, 2))),
        (range(3), TokenPrompt((0, 1, 2))),
        (np.array([4, 5]), TokenPrompt((4, 5))),
        ([], TokenPrompt(())),
        ([HELLO], ChatPrompt((HELLO,))),
        (({"role": "user", "content": "hello"}, HELLO), ChatPrompt((HELLO, HELLO))),
    ],
)
def test_the_shape_of_a_prompt_says_what_it_is(given: Any, prompt: Any):
    assert make_request(given, {}, None).prompt == prompt


@pytest.mark.parametrize(
    ("given", "param"),
    [
        (b"hello", "prompt"),
        (None, "prompt"),
        (7, "prompt"),
        ([1.5], "prompt"),
        (["hello"], "prompt"),
        ({"role": "user", "content": "x"}, "prompt"),
        ([HELLO, "x"], "messages[1]"),
        ([{"role": "user"}], "messages[0]"),
        ([{"role": "user", "content": "x", "name": "me"}], "messages[0]"),
    ],
)
def test_a_prompt_of_no_known_shape_is_refused(given: Any, param: str):
    with pytest.raises(InvalidRequestError) as caught:
        make_request(given, {}, None)
    assert caught.value.param == param
    assert param in caught.value.message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", -1),
        ("max_tokens", 2**32),
        ("max_tokens", "7"),
        ("temperature", "hot"),
        ("seed", -1),
        ("seed", 2**64),
        ("n", 1.5),
        ("priority", 2**31),
        ("logit_bias", {"a": 1.0}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", 5),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", 5),
        ("stop", [1]),
        ("stop", 1),
        ("model", 5),
        ("cache_salt", "\ud800"),
        ("timeout_s", 0),
        ("timeout_s", float("nan")),
    ],
)
def test_a_value_that_cannot_be_sent_is_named(name: str, value: Any):
    with pytest.raises(InvalidRequestError) as caught:
        request_to_proto(make_request("x", {name: value}, None))  # type: ignore[misc]
    assert caught.value.param == name
    assert name in caught.value.message


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        ([2**32], "prompt"),
        ([-1], "prompt"),
        ("\ud800", "prompt"),
        ([ChatMessage("user", 5)], "messages[0].content"),  # type: ignore[arg-type]
    ],
)
def test_a_prompt_that_cannot_be_sent_is_named(prompt: Any, param: str):
    with pytest.raises(InvalidRequestError) as caught:
        request_to_proto(make_request(prompt, {}, None))
    assert caught.value.param == param


def test_an_unknown_keyword_is_a_mistake_of_the_caller():
    with pytest.raises(TypeError, match="max_token"):
        make_request("x", {"max_token": 5}, None)  # type: ignore[typeddict-unknown-key]


def test_every_option_has_a_place_in_the_request():
    places = {option.name for kind in (GenerateRequest, SamplingOptions) for option in fields(kind)}
    assert GenerateOptions.__annotations__.keys() - {"timeout_s"} == places - {"prompt", "sampling", "deadline_s"}


def test_the_wire_gives_back_what_was_put_on_it():
    options: GenerateOptions = {
        "model": "m",
        "request_id": "r",
        "max_tokens": 0,
        "temperature": 0.0,
        "top_k": 3,
        "top_p": 0.5,
        "min_p": 0.25,
        "repetition_penalty": 1.5,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.5,
        "logit_bias": {7: -1.5},
        "min_tokens": 2,
        "ignore_eos": True,
        "stop_token_ids": [4, 5],
        "logprobs": 0,
        "seed": 0,
        "n": 3,
        "stop": "end",
        "priority": -2,
        "timeout_s": 2.5,
        "traceparent": "p",
        "tracestate": "s",
        "cache_salt": "c",
        "session_id": "i",
    }
    assert options.keys() == GenerateOptions.__annotations__.keys()
    for prompt in ("hello", [1, 2], [], [HELLO]):
        request = make_request(prompt, options, 9.0)
        assert request_from_proto(request_to_proto(request)) == request
    assert (request.deadline_s, request.stop) == (2.5, ("end",))


def test_none_means_not_given_and_the_client_s_timeout_holds():
    request = make_request("x", {"max_tokens": None, "timeout_s": None}, None)  # type: ignore[typeddict-item]
    assert request == make_request("x", {}, None)
    assert make_request("x", {}, 9.0).deadline_s == 9.0


@pytest.mark.parametrize("address", ["", "localhost", ":50051", "localhost:", "localhost:http"])
def test_an_address_needs_a_port(address: str):
    with pytest.raises(ConfigError) as caught:
        Client(address)
    assert caught.value.param == "address"
