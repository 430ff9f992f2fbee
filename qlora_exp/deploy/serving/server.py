"""An HTTP server that answers OpenAI's clients with a model and its adapters, one request after the other."""

import asyncio
import hmac
import ipaddress
import json
import logging
import threading
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from types import FrameType
from typing import Any

import uvicorn
from peft import PeftModel
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from qlora_exp.deploy import chat
from qlora_exp.deploy.chat import BASE, ChatModel, ContextError, Reply, Sampling
from qlora_exp.deploy.serving.protocol import ApiError, Body, ChatBody, TextBody, read
from qlora_exp.utils.errors import UserError, did_you_mean, is_out_of_memory
from qlora_exp.utils.units import MIB

_LONGEST_BODY = 8 * MIB
_MOST_CONNECTIONS = 100
"""More are answered with the status 503."""
_SECONDS_TO_END = 5
_SECONDS_FOR_A_BODY = 30
_OF_THIS_MACHINE = ("localhost", "127.0.0.1", "::1", "[::1]")
_CLIENT_IS_GONE = 499
"""Status in the log; nobody reads it."""

log = logging.getLogger("uvicorn.error")


@dataclass(frozen=True)
class Question:
    """A request that was checked, with the tokens of its prompt."""

    body: Body
    request: chat.Request
    ids: list[int]
    sampling: Sampling

    def chunk(self, index: int, text: str | None = None, finish: str | None = None) -> dict[str, Any]:
        """Return a part of a streamed answer: its beginning if there is no text and no end."""
        if isinstance(self.body, TextBody):
            return {"index": index, "text": text or "", "logprobs": None, "finish_reason": finish}
        delta = {"role": "assistant", "content": ""} if text is None and finish is None else {"content": text}
        return {"index": index, "delta": {} if finish else delta, "logprobs": None, "finish_reason": finish}

    def choice(self, index: int, reply: Reply) -> dict[str, Any]:
        """Return a whole answer."""
        own: dict[str, Any] = {"text": reply.text}
        if isinstance(self.body, ChatBody):
            own = {"message": {"role": "assistant", "content": reply.text, "refusal": None}}
        return {"index": index, **own, "logprobs": None, "finish_reason": finish_reason(reply)}

    def usage(self, generated: int) -> dict[str, int]:
        """Return the numbers of tokens."""
        asked = len(self.ids)
        return {"prompt_tokens": asked, "completion_tokens": generated, "total_tokens": asked + generated}

    def about(self, chunk: bool = False) -> dict[str, Any]:
        """Return what is the same in all parts of an answer."""
        id_, object_ = "cmpl", "text_completion"
        if isinstance(self.body, ChatBody):
            id_, object_ = "chatcmpl", "chat.completion.chunk" if chunk else "chat.completion"
        return {
            "id": f"{id_}-{uuid.uuid4().hex}",
            "object": object_,
            "created": int(time.time()),
            "model": self.body.model,
        }


def finish_reason(reply: Reply) -> str:
    """Return why an answer ended, in OpenAI's words."""
    return "stop" if reply.complete else "length"


class Endpoint:
    """The server's routes."""

    def __init__(self, talker: ChatModel, defaults: Sampling, key: str | None = None) -> None:
        """Keep the model, how tokens are chosen if a request does not say, and the key that clients must send."""
        self._talker, self._defaults, self._key = talker, defaults, key
        self.names = [*talker.saved, *([BASE] if isinstance(talker.model, PeftModel) else [])]
        self._created = int(time.time())
        self._reading, self._generating = ThreadPoolExecutor(1, "read"), ThreadPoolExecutor(1, "generate")
        self._closing = threading.Event()
        routes = [
            Route("/health", self._health),
            Route("/v1/models", self._models),
            Route("/v1/models/{name}", self._model),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._complete, methods=["POST"]),
        ]
        handlers: dict[Any, Any] = {ApiError: _refused, HTTPException: _http_error, ClientDisconnect: _left}
        self.app = Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        yield
        self.close()
        for threads in (self._reading, self._generating):
            threads.shutdown(cancel_futures=True)

    def close(self) -> None:
        """End all answers with their next token."""
        self._closing.set()

    async def _health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _models(self, request: Request) -> Response:
        self._authorize(request)
        return JSONResponse({"object": "list", "data": [self._entry(name) for name in self.names]})

    async def _model(self, request: Request) -> Response:
        self._authorize(request)
        return JSONResponse(self._entry(self._named(request.path_params["name"])))

    async def _chat(self, request: Request) -> Response:
        return await self._answered(request, ChatBody)

    async def _complete(self, request: Request) -> Response:
        return await self._answered(request, TextBody)

    def _entry(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._created, "owned_by": "qlora-exp"}

    def _authorize(self, request: Request) -> None:
        given = request.headers.get("authorization", "").encode("latin-1")
        if self._key is not None and not hmac.compare_digest(given, f"Bearer {self._key}".encode()):
            raise ApiError(401, "The API key is missing or wrong", code="invalid_api_key")

    def _named(self, name: str) -> str:
        if name not in self.names:
            hint = f"{did_you_mean(name[:100], self.names)} Models: {', '.join(self.names)}"
            raise ApiError(404, f"The model '{name:.100}' does not exist{hint}", "model", "model_not_found")
        return name

    async def _answered(self, request: Request, kind: type[Body]) -> Response:
        self._authorize(request)
        body = read(kind, await _content(request))
        self._named(body.model)
        try:
            question = await asyncio.get_running_loop().run_in_executor(self._reading, self._question, body)
            if body.stream:
                return StreamingResponse(self._events(question), media_type="text/event-stream")
            return await _while_connected(request, self._whole(question))
        except ApiError:
            raise
        except Exception as error:  # of any kind: the server goes on
            raise _explained(error) from error

    def _question(self, body: Body) -> Question:
        """Check what only the model can: whether the prompt format takes the dialogue, and whether it is too long."""
        request, sampling = body.request, body.sampling(self._defaults)
        limit, most = body.limit
        field = "prompt" if request.raw else "messages"
        if self._talker.templates[self._talker.named(body.model)] is None and len(request.messages) > 1:
            why = "This model continues plain text and has no dialogues: send one message"
            raise ApiError(400, why, field, "invalid_value")
        if most is None:  # what the context leaves
            sampling = replace(sampling, max_new_tokens=1)
        try:
            ids = self._talker.encoded(request, sampling)
        except ContextError as error:
            raise ApiError(
                400,
                f"This model's maximum context length is {error.most} tokens. However, you requested "
                f"{error.prompt + error.new} tokens ({error.prompt} in the prompt, {error.new} in the answer). Please "
                f"shorten the prompt{'' if most is None else f', or lower {limit}'}",
                field,
                "context_length_exceeded",
            ) from error
        except UserError as error:
            raise ApiError(400, str(error), field, "invalid_value") from error
        if most is None:
            room = self._talker.room(body.model, len(ids))
            default = self._defaults.max_new_tokens
            sampling = replace(sampling, max_new_tokens=default if room is None else min(default, room))
        return Question(body, request, ids, sampling)

    async def _pieces(self, question: Question) -> AsyncGenerator[tuple[int, str | Reply]]:
        """Generate each choice; yield its pieces, and then the whole. Generation ends when nobody waits for more."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[tuple[int, str | Reply] | None] = asyncio.Queue()
        gone = threading.Event()

        def cancelled() -> bool:
            return gone.is_set() or self._closing.is_set()

        def put(item: tuple[int, str | Reply] | None) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, item)

        def put_text(index: int, text: str) -> None:
            put((index, text))

        def generate() -> None:
            try:
                for index in range(question.body.n):
                    if cancelled():
                        return
                    reply = self._reply(question, index, partial(put_text, index), cancelled)
                    if not cancelled():  # otherwise it is not whole
                        put((index, reply))
            finally:
                put(None)

        generated = loop.run_in_executor(self._generating, generate)
        try:
            while (item := await queue.get()) is not None:
                yield item
            await generated
            if self._closing.is_set():
                raise ApiError(503, "The server was ended", code="server_ended")
        finally:
            gone.set()

    def _reply(
        self, question: Question, index: int, on_text: Callable[[str], None], cancelled: Callable[[], bool]
    ) -> Reply:
        sampling = question.sampling
        if sampling.seed is not None:
            sampling = replace(sampling, seed=(sampling.seed + index) % 2**32)
        return self._talker.reply(question.request, question.ids, sampling, on_text, question.body.stop, cancelled)

    async def _whole(self, question: Question) -> Response:
        replies: list[Reply] = []
        async with aclosing(self._pieces(question)) as pieces:
            async for _, piece in pieces:
                if isinstance(piece, Reply):
                    replies.append(piece)
        choices = [question.choice(index, reply) for index, reply in enumerate(replies)]
        usage = question.usage(sum(reply.tokens for reply in replies))
        return JSONResponse(question.about() | {"choices": choices, "usage": usage})

    async def _events(self, question: Question) -> AsyncIterator[str]:
        about, options = question.about(chunk=True), question.body.stream_options

        def event(*choices: dict[str, Any], **more: Any) -> str:
            more = {"usage": None} | more if options.include_usage else {}
            return _event(about | {"choices": choices} | more)

        begun, generated = -1, 0
        try:
            async with aclosing(self._pieces(question)) as pieces:
                async for index, piece in pieces:
                    if index > begun:
                        begun = index
                        yield event(question.chunk(index))
                    if isinstance(piece, Reply):
                        generated += piece.tokens
                        yield event(question.chunk(index, finish=finish_reason(piece)))
                    else:
                        yield event(question.chunk(index, piece))
        except Exception as error:  # of any kind: the status was sent before
            yield _event((error if isinstance(error, ApiError) else _explained(error)).body)
            return
        if options.include_usage:
            yield event(usage=question.usage(generated))
        yield "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


async def _content(request: Request) -> bytes:
    """Return the body of a request; a page in a browser cannot send one of this type to another site unasked."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "The header Content-Type must be application/json")
    too_long = ApiError(413, f"The body is longer than {_LONGEST_BODY // MIB} MiB")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and (len(length) > 20 or int(length) > _LONGEST_BODY):  # Python refuses very long numbers
        raise too_long
    content = b""
    try:
        async with asyncio.timeout(_SECONDS_FOR_A_BODY):
            async for part in request.stream():
                content += part
                if len(content) > _LONGEST_BODY:
                    raise too_long
    except TimeoutError as error:
        raise ApiError(408, f"The body did not come within {_SECONDS_FOR_A_BODY} seconds") from error
    return content


async def _while_connected(request: Request, answer: Awaitable[Response]) -> Response:
    """Wait for an answer as long as its client does."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answering, leaving = asyncio.ensure_future(answer), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait([answering, leaving], return_when=asyncio.FIRST_COMPLETED)
        return answering.result() if answering.done() else Response(status_code=_CLIENT_IS_GONE)
    finally:
        answering.cancel()
        leaving.cancel()


def _explained(error: Exception) -> ApiError:
    """Return an error of the server itself, and log it."""
    log.error("a request failed", exc_info=error)
    if is_out_of_memory(error):
        return ApiError(500, "Out of memory: shorten the prompt or the answer", code="out_of_memory")
    return ApiError(500, "The server failed; its log says why")


async def _refused(_: Request, error: ApiError) -> Response:
    return JSONResponse(error.body, error.status)


async def _http_error(request: Request, error: HTTPException) -> Response:
    message = f"{error.detail}: {request.method} {request.scope['path']:.200}"
    return JSONResponse(ApiError(error.status_code, message).body, error.status_code, error.headers)


async def _left(_: Request, __: ClientDisconnect) -> Response:
    return Response(status_code=_CLIENT_IS_GONE)


def guarded(endpoint: Endpoint, host: str, more_hosts: Sequence[str] = ()) -> TrustedHostMiddleware:
    """Return the application, which a server for this machine answers only if it is asked for as this machine.

    So a page in a browser whose name leads here (DNS rebinding) gets no answer.

    Args:
        endpoint: the server's routes.
        host: the address to listen on.
        more_hosts: further names by which clients may ask for it, such as that of a proxy.
    """
    names = [*_OF_THIS_MACHINE, host, *more_hosts] if more_hosts or is_this_machine(host) else ["*"]
    return TrustedHostMiddleware(endpoint.app, names)


def is_this_machine(host: str) -> bool:
    """Return whether an address to listen on is reached from this machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def run(endpoint: Endpoint, host: str, port: int, more_hosts: Sequence[str] = ()) -> None:
    """Answer requests until Ctrl-C; the arguments are those of `guarded`, and the port."""

    class Uvicorn(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            endpoint.close()  # it waits for answers that are being generated
            super().handle_exit(sig, frame)

    settings = uvicorn.Config(
        guarded(endpoint, host, more_hosts),
        host,
        port,
        ws="none",
        limit_concurrency=_MOST_CONNECTIONS,
        timeout_graceful_shutdown=_SECONDS_TO_END,
    )
    with suppress(KeyboardInterrupt):
        Uvicorn(settings).run()
