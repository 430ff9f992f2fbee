"""OpenAI's own client asks the server on loopback; two adapters on one base."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import OpenAI
from starlette.testclient import TestClient

from qlora_exp.deploy.chat import Request, Sampling, asked, load_chat_model
from qlora_exp.deploy.serving import server
from qlora_exp.deploy.serving.server import Endpoint

pytestmark = pytest.mark.slow

CHAT = "dataset.format=chat"
WHY = [{"role": "user", "content": "Why?"}]


@pytest.fixture(scope="module")
def talker(trained_adapters):
    """Two adapters on one base, trained in different formats."""
    sources = {"default": str(trained_adapters("training.max_steps=9")), "other": str(trained_adapters(CHAT))}
    return load_chat_model(sources, device="cpu")


@pytest.fixture(scope="module")
def serve() -> Iterator[Callable[[Endpoint], str]]:
    """Start servers in threads; give their addresses."""
    started: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(endpoint: Endpoint) -> str:
        listening = socket.create_server(("127.0.0.1", 0))
        running = uvicorn.Server(uvicorn.Config(endpoint.app, log_level="critical", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()
        started.append((running, thread))
        return f"127.0.0.1:{listening.getsockname()[1]}"

    yield start
    for running, _ in started:
        running.should_exit = True
    for _, thread in started:
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def address(talker, serve) -> str:
    return serve(Endpoint(talker, Sampling(max_new_tokens=24)))


@pytest.fixture(scope="module")
def client(address) -> OpenAI:
    return OpenAI(base_url=f"http://{address}/v1", api_key="none", max_retries=0)


def text_of(chunks: Any) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_answer_is_that_of_the_generate_command(client, talker):
    ids = talker.encoded(asked("Why?"), Sampling())
    whole = talker.reply(asked("Why?"), ids, Sampling(24))
    done = client.chat.completions.create(model="default", messages=WHY)
    assert done.choices[0].message.content == talker.answer(asked("Why?"), Sampling(24)) == whole.text != ""
    assert done.choices[0].finish_reason == ("stop" if whole.complete else "length")
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (len(ids), whole.tokens)
    assert done.usage.total_tokens == len(ids) + whole.tokens
    assert (done.object, done.model, done.choices[0].message.role) == ("chat.completion", "default", "assistant")
    parts = [{"role": "user", "content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}]}]
    again = client.chat.completions.create(model="default", messages=parts, temperature=0, top_p=1, n=2)
    assert [choice.message.content for choice in again.choices] == [whole.text] * 2
    assert again.usage.completion_tokens == 2 * whole.tokens
    for limit in ("max_tokens", "max_completion_tokens"):
        short = client.chat.completions.create(model="default", messages=WHY, **{limit: 1})
        assert (short.usage.completion_tokens, short.choices[0].finish_reason) == (1, "length")


def test_streamed_answer_is_the_whole_one(client):
    options: dict[str, Any] = {"model": "default", "messages": WHY, "max_tokens": 24}
    whole = client.chat.completions.create(**options)
    chunks = [*client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})]
    assert text_of(chunks) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len(chunks) > 4
    *chunks, last = chunks
    assert (last.choices, last.usage) == ([], whole.usage)
    assert {chunk.usage for chunk in chunks} == {None}
    ends = [chunk.choices[0].finish_reason for chunk in chunks]
    assert ends == [None] * (len(ends) - 1) + [whole.choices[0].finish_reason]
    without = [*client.chat.completions.create(**options, stream=True, n=2)]
    by_index = [text_of(chunk for chunk in without if chunk.choices[0].index == index) for index in (0, 1)]
    assert by_index == [whole.choices[0].message.content] * 2
    assert len({chunk.id for chunk in without}) == 1


def test_stop_ends_an_answer_before_it(client, talker):
    options: dict[str, Any] = {"model": "default", "messages": WHY}
    whole = client.chat.completions.create(**options).choices[0].message.content
    stop = whole[len(whole) // 2 :][:3]
    for stops in (stop, ["never in it", stop]):
        done = client.chat.completions.create(**options, stop=stops)
        assert done.choices[0].message.content == whole[: whole.index(stop)].strip()
        assert done.choices[0].finish_reason == "stop"
        assert text_of(client.chat.completions.create(**options, stop=stops, stream=True)) == (
            done.choices[0].message.content
        )
    generated = talker.tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert done.usage.completion_tokens <= len(generated)


def test_seed_repeats_an_answer(client):
    options: dict[str, Any] = {"model": "default", "messages": WHY, "temperature": 1.5}
    one, two = (client.chat.completions.create(**options, seed=-7, n=2) for _ in range(2))
    assert [choice.message.content for choice in one.choices] == [choice.message.content for choice in two.choices]
    assert one.choices[0].message.content != one.choices[1].message.content
    drawn = {client.chat.completions.create(**options).choices[0].message.content for _ in range(3)}
    assert len(drawn) == 3


def test_each_model_answers_as_it_does_alone(client, talker, trained_adapters):
    assert [model.id for model in client.models.list()] == ["default", "other", "base"]
    assert client.models.retrieve("other").id == "other"
    alone = load_chat_model({"x": str(trained_adapters(CHAT))}, device="cpu").answer(asked("Why?"), Sampling(24))
    done = {
        name: client.chat.completions.create(model=name, messages=WHY).choices[0].message.content
        for name in ("default", "other", "base", "default")
    }
    assert done["other"] == alone
    assert len({*done.values()}) == 3
    assert done["base"] == talker.answer(asked("Why?", "base"), Sampling(24))
    system = [{"role": "system", "content": "Be brief."}, *WHY]
    brief = client.chat.completions.create(model="other", messages=system)
    assert brief.usage.prompt_tokens == len(talker.encoded(Request(system, adapter="other"), Sampling()))
    sent_back = brief.choices[0].message.model_dump()
    more = client.chat.completions.create(model="other", messages=[*system, sent_back, *WHY], max_tokens=1)
    assert more.usage.prompt_tokens > brief.usage.prompt_tokens


def test_text_is_continued_as_it_is(client, talker):
    done = client.completions.create(model="default", prompt="Why? ", max_tokens=8)
    ids = talker.tokenizer("Why? ")["input_ids"]
    assert done.usage.prompt_tokens == len(ids)
    expected = talker.model.generate(
        talker.tokenizer("Why? ", return_tensors="pt")["input_ids"], max_new_tokens=8, do_sample=False
    )
    assert done.choices[0].text == talker.tokenizer.decode(expected[0, len(ids) :], skip_special_tokens=True)
    chunks = client.completions.create(model="default", prompt=["Why? "], max_tokens=8, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == done.choices[0].text


def test_six_requests_at_once_are_answered_each_as_alone(client):
    def ask(place: int) -> str:
        options: dict[str, Any] = {
            "model": ("default", "other")[place % 2],
            "messages": [{"role": "user", "content": f"Why {place}?"}],
        }
        if place > 2:
            return text_of(client.chat.completions.create(**options, stream=True))
        return client.chat.completions.create(**options).choices[0].message.content

    with ThreadPoolExecutor(6) as threads:
        at_once = [*threads.map(ask, range(6))]
    assert at_once == [ask(place) for place in range(6)]
    assert len({*at_once}) > 2  # of a tiny model


@pytest.mark.parametrize(
    ("error", "param", "code", "changes"),
    [
        (openai.NotFoundError, "model", "model_not_found", {"model": "gpt-4o"}),
        (openai.BadRequestError, "messages", "invalid_value", {"messages": []}),
        (openai.BadRequestError, "max_tokens", "invalid_value", {"max_tokens": -1}),
        (openai.BadRequestError, "max_completion_tokens", "invalid_value", {"max_completion_tokens": 0}),
        (openai.BadRequestError, "temperature", "invalid_value", {"temperature": -1}),
        (openai.BadRequestError, "top_p", "invalid_value", {"top_p": 0}),
        (openai.BadRequestError, "n", "invalid_value", {"n": 0}),
        (openai.BadRequestError, "stop", "invalid_value", {"stop": ["a"] * 5}),
        (openai.BadRequestError, "stop[0]", "invalid_value", {"stop": ""}),
        (openai.BadRequestError, "stream_options", "invalid_value", {"stream_options": {"include_usage": True}}),
        (openai.BadRequestError, "frequency_penalty", "unsupported_value", {"frequency_penalty": 0.5}),
        (openai.BadRequestError, "presence_penalty", "unsupported_value", {"presence_penalty": 1}),
        (openai.BadRequestError, "logprobs", "unsupported_value", {"logprobs": True}),
        (openai.BadRequestError, "logit_bias", "unsupported_value", {"logit_bias": {"5": 1}}),
        (openai.BadRequestError, "response_format", "unsupported_value", {"response_format": {"type": "json_object"}}),
        (openai.BadRequestError, "tools", "unsupported_value", {"tools": [{"type": "function"}]}),
        (openai.BadRequestError, "min_p", "unknown_parameter", {"extra_body": {"min_p": 0.1}}),
        (openai.BadRequestError, "messages[0].role", "invalid_value", {"messages": [{"role": "tool", "content": ""}]}),
        (
            openai.BadRequestError,
            "messages[0].content",
            "invalid_value",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        ),
        (openai.BadRequestError, "messages[0].name", "unknown_parameter", {"messages": [{**WHY[0], "name": "Ann"}]}),
        (openai.BadRequestError, "messages", "invalid_value", {"messages": [{"role": "system", "content": "x"}, *WHY]}),
        (openai.BadRequestError, "messages", "context_length_exceeded", {"max_tokens": 2040}),
        (
            openai.BadRequestError,
            "messages",
            "context_length_exceeded",
            {"messages": [{"role": "user", "content": "a" * 3000}]},
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_done_is_refused_by_name(error, param, code, changes, stream, client):
    with pytest.raises(error) as refused:
        options: dict[str, Any] = {"model": "default", "messages": WHY, "stream": stream, **changes}
        if stream and "stream_options" in changes:
            options["stream"] = False
        client.chat.completions.create(**options)
    assert (refused.value.param, refused.value.code, refused.value.type) == (param, code, "invalid_request_error")
    assert str(refused.value.body["message"])


def test_fields_that_change_nothing_are_taken(client):
    whole = client.chat.completions.create(model="default", messages=WHY).choices[0].message.content
    asks: dict[str, Any] = {
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "logprobs": False,
        "response_format": {"type": "text"},
        "tools": [],
        "user": "ann",
        "metadata": {"a": "b"},
        "stop": None,
    }
    more = {"repetition_penalty": 1, "top_k": 0}
    done = client.chat.completions.create(model="default", messages=WHY, **asks, extra_body=more)
    assert done.choices[0].message.content == whole


def post(address: str, body: bytes, path: str = "/v1/chat/completions", **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(address, timeout=60)
    connection.request("POST", path, body, {"Content-Type": "application/json", **headers})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    if answer.headers["Content-Type"].startswith("text/event-stream"):
        content = content.split(b"data: ")[1]
    return answer.status, json.loads(content)


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"[]", b"7", b"null", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b"1" * 10_000),
        b'{"model": "default", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "\\ud800", "messages": []}',
        b'{"\\ud800": 1}',
        b'{"model": "default", "model": "other"}',
        b'{"model": "default", "messages": [{"role": "user", "content": "a"}], "temperature": NaN}',
        b'{"model": "default", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1e400}',
        b'{"model": "default", "messages": [{"role": "user", "content": "a"}], "max_tokens": true}',
        b'{"model": "default", "messages": [{"role": "user", "content": "a"}], "top_k": -1}',
        b'{"model": "default", "messages": "Why?"}',
        b'{"model": "default", "messages": [7]}',
        b'{"model": "default", "messages": {"role": "user"}}',
        b'{"model": "default", "messages": [{"role": "assistant", "content": "a"}]}',
        b'{"model": 7, "messages": []}',
        b'{"messages": []}',
    ],
    ids=lambda body: repr(body[:60]),
)
def test_wrong_body_is_refused_with_an_error_object(body, address):
    for path in ("/v1/chat/completions", "/v1/completions"):
        status, answer = post(address, body, path)
        assert status == 400
        assert answer["error"]["type"] == "invalid_request_error"
        assert answer["error"]["message"]


def test_other_requests_are_answered_with_error_objects(address):
    assert post(address, b"{}", **{"Content-Type": "text/plain"})[0] == 415
    status, answer = post(address, b" " * (8 * 2**20 + 1))
    assert (status, answer["error"]["message"]) == (413, "The body is longer than 8 MiB")
    assert post(address, b"{}", "/v1/embeddings", Host="[")[0] == 404
    assert post(address, b"{}", "/health")[1]["error"]["message"] == "Method Not Allowed: POST /health"
    connection = http.client.HTTPConnection(address, timeout=60)
    connection.request("GET", "/health")
    assert json.loads(connection.getresponse().read()) == {"status": "ok"}


def test_a_body_that_is_announced_as_too_long_is_refused_before_it_comes(address):
    for length in ("99999999999", "9" * 40):
        connection = http.client.HTTPConnection(address, timeout=20)
        connection.putrequest("POST", "/v1/completions")
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", length)
        connection.endheaders(b"{")
        answer = connection.getresponse()
        assert (answer.status, b"longer than 8 MiB" in answer.read()) == (413, True) or len(length) == 40


def test_a_body_that_does_not_come_is_not_waited_for(address, monkeypatch):
    monkeypatch.setattr(server, "_SECONDS_FOR_A_BODY", 0.2)
    connection = http.client.HTTPConnection(address, timeout=20)
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", "1000")
    connection.endheaders(b"{")
    assert connection.getresponse().status == 408


@pytest.mark.parametrize(
    ("listens", "more", "asked_for", "status"),
    [
        ("127.0.0.1", [], "127.0.0.1:8000", 200),
        ("127.0.0.1", [], "LOCALHOST:8000", 200),
        ("localhost", [], "[::1]:8000", 200),
        ("127.0.0.1", [], "evil.example:8000", 400),
        ("127.0.0.1", [], "localhost.evil.example", 400),
        ("127.0.0.1", ["models.example"], "models.example", 200),
        ("127.0.0.2", [], "evil.example", 400),
        ("127.0.0.2", [], "127.0.0.2:8000", 200),
        ("0.0.0.0", [], "models.example", 200),
        ("0.0.0.0", ["models.example"], "models.example", 200),
        ("0.0.0.0", ["models.example"], "evil.example", 400),
    ],
)
def test_a_server_for_this_machine_is_not_asked_for_by_other_names(talker, listens, more, asked_for, status):
    app = server.guarded(Endpoint(talker, Sampling()), listens, more)
    with TestClient(app, base_url="http://localhost") as asking:
        assert asking.get("/v1/models", headers={"Host": asked_for}).status_code == status


@pytest.mark.parametrize("stream", [True, False])
def test_generation_ends_when_its_client_leaves(stream, talker, serve, monkeypatch):
    ended = threading.Event()
    reply = type(talker).reply
    generated: list[int] = []

    def watched(*arguments: Any) -> Any:
        done = reply(*arguments)
        generated.append(done.tokens)
        ended.set()
        return done

    monkeypatch.setattr(type(talker), "reply", watched)
    address = serve(Endpoint(talker, Sampling(max_new_tokens=2000)))
    body = {"model": "default", "messages": WHY, "stream": stream, "temperature": 5, "stop": ["never in it"]}
    connection = http.client.HTTPConnection(address, timeout=60)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    if stream:
        assert connection.getresponse().read(5) == b"data:"
    else:
        time.sleep(0.3)
    connection.sock.close() if connection.sock else connection.close()
    assert ended.wait(20)
    assert generated[0] < 1500


def test_server_names_its_own_failures_and_goes_on(talker, serve, monkeypatch):
    client = OpenAI(base_url=f"http://{serve(Endpoint(talker, Sampling(4)))}/v1", api_key="x", max_retries=0)
    options: dict[str, Any] = {"model": "default", "messages": WHY}
    with monkeypatch.context() as patched:
        patched.setattr(type(talker), "reply", lambda *_: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(openai.InternalServerError, match="Out of memory"):
            client.chat.completions.create(**options)
        with pytest.raises(openai.APIError, match="Out of memory"):
            text_of(client.chat.completions.create(**options, stream=True))
    assert client.chat.completions.create(**options).choices


def test_answers_end_when_the_server_does(talker, serve):
    endpoint = Endpoint(talker, Sampling(max_new_tokens=2000, temperature=9))
    client = OpenAI(base_url=f"http://{serve(endpoint)}/v1", api_key="x", max_retries=0)
    endless = client.chat.completions.create(model="default", messages=WHY, stream=True)
    next(endless)
    endpoint.close()
    with pytest.raises(openai.APIError, match="The server was ended"):
        for chunk in endless:
            assert chunk.choices[0].finish_reason is None
    with pytest.raises(openai.InternalServerError, match="The server was ended"):
        client.chat.completions.create(model="default", messages=WHY)


WORDS = st.sampled_from(["default", "base", "user", "system", "assistant", "Why?", "text", "é\u4e2d", "\ud800", ""])
NUMBERS = st.sampled_from([-1, 0, 1, 2, 0.5, 1e-9, 1e308, 10**30, float("nan"), float("inf"), True])
VALUES = st.recursive(
    st.none() | WORDS | NUMBERS,
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "include_usage"]), inner, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = (
    *("model", "messages", "max_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed", "stop", "n"),
    *("stream", "stream_options", "logprobs", "logit_bias", "tools", "user", "prompt", "echo", "other"),
)
VALID = {"model": "default", "messages": WHY, "prompt": "Why?", "max_tokens": 2}


@settings(max_examples=150, deadline=None)
@given(where=st.sampled_from([("chat/completions", "prompt"), ("completions", "messages")]), data=st.data())
def test_no_body_makes_the_server_fail(where, data, address):
    path, foreign = where
    body = {name: value for name, value in VALID.items() if name != foreign}
    body |= data.draw(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=3))
    status, answer = post(address, json.dumps(body).encode(), f"/v1/{path}")
    assert status in (200, 400, 404), answer
    assert ("error" in answer) == (status != 200)


def test_key_is_asked_for(talker, serve):
    address = serve(Endpoint(talker, Sampling(4), "sesame-é"))
    with pytest.raises(openai.AuthenticationError) as refused:
        OpenAI(base_url=f"http://{address}/v1", api_key="open", max_retries=0).models.list()
    assert refused.value.code == "invalid_api_key"
    status, _ = post(address, b"{}", Authorization="Bearer sesame-é".encode().decode("latin-1"))
    assert status == 400


def test_plain_text_model_has_no_dialogues(trained_adapters, serve):
    plain = load_chat_model(
        {"default": str(trained_adapters("dataset.format=text", "dataset.text_column=output"))}, device="cpu"
    )
    client = OpenAI(base_url=f"http://{serve(Endpoint(plain, Sampling(4)))}/v1", api_key="x", max_retries=0)
    done = client.chat.completions.create(model="default", messages=WHY)
    assert done.choices[0].message.content == plain.answer(asked("Why?"), Sampling(4))
    with pytest.raises(openai.BadRequestError, match="continues plain text"):
        client.chat.completions.create(model="default", messages=[*WHY, *WHY])


def test_context_limits_answers_whose_length_is_not_asked_for(talker, serve):
    client = OpenAI(base_url=f"http://{serve(Endpoint(talker, Sampling(5000)))}/v1", api_key="x", max_retries=0)
    long = [{"role": "user", "content": "Why? " * 380}]
    prompt = len(talker.encoded(Request(long), Sampling(1)))
    done = client.chat.completions.create(model="default", messages=long)
    assert done.usage.total_tokens <= 2048
    assert done.usage.prompt_tokens == prompt
