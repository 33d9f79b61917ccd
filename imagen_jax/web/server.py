"""The drawing page as a Starlette application: one page, one model, one picture at a time.

A picture is one streamed response, so closing the connection is how a browser stops it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from imagen_jax.common import network
from imagen_jax.common.cli import log
from imagen_jax.common.errors import UserError
from imagen_jax.pipeline.cascade import Job
from imagen_jax.pipeline.stepping import Stepper
from imagen_jax.web import drawing
from imagen_jax.web.drawing import Model
from imagen_jax.web.requests import MAX_BODY, Drawing, parse

PAGE = Path(__file__).parent / "page.html"
MAX_WAITING = 16  # pictures in line
POLL_SECONDS = 0.1


def make_app(model: Model, host: str = "127.0.0.1") -> Starlette:
    """Returns the application.

    Args:
      host: the address it is served at. On a loopback address only requests for this machine's own
        names are answered, so that a foreign page cannot reach the server by a name of its own (DNS
        rebinding).
    """
    stepper = Stepper(model.pipe)
    line: list[Picture] = []

    async def draw(request: Request) -> Response:
        # A foreign page can send this type only after a preflight, which is not answered.
        kind = request.headers.get("content-type", "").partition(";")[0].strip()
        if kind != "application/json":
            return _error(415, "Content-Type must be application/json")
        try:
            wanted, job = await run_in_threadpool(_prepare, model, await _body(request))
        except UserError as e:
            return _error(400, str(e))
        except (ValueError, RecursionError):
            return _error(400, "the request is not JSON")
        if len(line) >= MAX_WAITING:
            return _error(503, f"{MAX_WAITING} pictures are waiting; try again later")
        return Picture(line, drawing.events(model, stepper, wanted, job))

    async def about(request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(drawing.describe, model))

    async def page(request: Request) -> Response:
        return FileResponse(PAGE, headers={"Cache-Control": "no-cache"})

    return Starlette(
        routes=[
            Route("/", page),
            Route("/model", about),
            Route("/draw", draw, methods=["POST"]),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=network.allowed_hosts(host))],
    )


class Picture(StreamingResponse):
    """The server-sent events of one picture, which waits in line until those before it end."""

    def __init__(self, line: list[Picture], events: Any):
        headers = {"Cache-Control": "no-store"}
        super().__init__(self._messages(), headers=headers, media_type="text/event-stream")
        self._line, self._events = line, events

    async def __call__(self, *args: Any) -> None:
        self._line.append(self)
        try:
            await super().__call__(*args)
        finally:  # also if the browser has gone, which cancels the call between two evaluations
            self._line.remove(self)

    async def _messages(self) -> AsyncIterator[str]:
        ahead = None
        while (now := self._line.index(self)) > 0:
            if now != ahead:
                ahead = now
                yield _message({"ahead": ahead})
            await anyio.sleep(POLL_SECONDS)
        try:
            async for event in iterate_in_threadpool(self._events):
                yield _message(event)
        except UserError as e:
            yield _message({"error": str(e)})
        except Exception:
            log.exception("drawing failed")
            yield _message({"error": "drawing failed; the terminal of the server says why"})


def _prepare(model: Model, body: bytes) -> tuple[Drawing, Job]:
    wanted = parse(json.loads(body), len(model.pipe.stages))
    return wanted, drawing.prepare(model, wanted)


def _message(event: dict[str, Any]) -> str:
    return f"data: {json.dumps(event)}\n\n"


def _error(status: int, text: str) -> Response:
    return JSONResponse({"error": text}, status)


async def _body(request: Request) -> bytes:
    body = bytearray()
    with contextlib.suppress(ClientDisconnect):
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY:
                raise UserError(f"the request is larger than {MAX_BODY // 2**20} MB")
    return bytes(body)


def serve(model: Model, bound: socket.socket, host: str) -> None:
    """Serves the page at a bound address until Ctrl-C."""
    config = uvicorn.Config(
        make_app(model, host),
        log_config=None,
        log_level=logging.WARNING,
        lifespan="off",
        timeout_graceful_shutdown=1,
    )
    uvicorn.Server(config).run(sockets=[bound])
