"""The rating pages as a Starlette application.

    r/TOKEN/             a rater's page, with state, answer and picture/ID below it
    results/TOKEN/       the results, with answers.csv below it

Whoever has a rater's link sees and changes that rater's answers and no others. Names of models
appear only below results/.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import (
    FileResponse,
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    Response,
)
from starlette.routing import Route

from imagen_jax.common.errors import UserError
from imagen_jax.evaluation.rating import protocols, results
from imagen_jax.evaluation.rating.store import Store
from imagen_jax.evaluation.rating.study import PICTURES

PAGE = Path(__file__).parent / "page.html"
MAX_BODY = 4096  # bytes of a request
MAX_SECONDS = 1e6  # of thinking about one trial
NAME = re.compile(r"([0-9a-f]{16})(-full)?")  # of a picture
# Links are secrets, so pages must not pass them on; nothing is loaded from elsewhere.
HEADERS = {
    "Referrer-Policy": "no-referrer",
    "X-Robots-Tag": "noindex",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'self' data: 'unsafe-inline'; frame-ancestors 'none'",
}
FRESH = HEADERS | {"Cache-Control": "no-store"}
FOREVER = HEADERS | {"Cache-Control": "private, max-age=31536000, immutable"}


def make_app(store: Store, hosts: list[str], margin: float = results.MARGIN) -> Starlette:
    """Returns the application.

    Args:
      hosts: host names that requests may ask for; ["*"] is all.
      margin: that the results page counts the missing raters for.
    """
    settings = store.settings()
    pictures = store.path.parent / PICTURES

    def rater_of(request: Request) -> int:
        rater = store.rater_of(request.path_params["token"])
        if rater is None:
            raise HTTPException(404, "This link is not valid. Ask for a new one.")
        return rater

    def page(request: Request) -> Response:
        rater_of(request)
        return FileResponse(PAGE, headers=HEADERS | {"Cache-Control": "no-cache"})

    def state(request: Request) -> Response:
        tasks = store.tasks(rater_of(request))
        questions = {
            kind: [question._asdict() for question in protocols.QUESTIONS[kind]]
            for kind in {task["kind"] for task in tasks}
        }
        about = {"questions": questions, "pixelated": settings["pixelated"], "trials": tasks}
        return JSONResponse(about, headers=FRESH)

    def picture(request: Request) -> Response:
        rater_of(request)
        name = NAME.fullmatch(request.path_params["name"])
        if name is None:
            raise HTTPException(404)
        plain = pictures / f"{name[1]}.webp"
        full = pictures / f"{name[0]}.webp"  # small pictures have no enlarged copy
        path = full if full.is_file() else plain
        if not path.is_file():
            raise HTTPException(404)
        return FileResponse(path, headers=FOREVER)

    async def answer(request: Request) -> Response:
        rater = await run_in_threadpool(rater_of, request)
        length = request.headers.get("content-length", "")
        if not length.isdigit() or int(length) > MAX_BODY:
            return _error(413, f"the request is larger than {MAX_BODY} bytes")
        try:
            given = parse(json.loads(await request.body()))
            await run_in_threadpool(store.answer, rater, *given)
        except UserError as e:
            return _error(400, str(e))
        except (ValueError, RecursionError):
            return _error(400, "the request is not JSON")
        return JSONResponse({"saved": True}, headers=FRESH)

    def check_results(request: Request) -> None:
        if not secrets.compare_digest(
            request.path_params["token"].encode(), settings["results"].encode()
        ):
            raise HTTPException(404, "This link is not valid.")

    def show_results(request: Request) -> Response:
        check_results(request)
        found = results.analyze(store, margin)
        return HTMLResponse(results.to_html(found), headers=FRESH)

    def answers_csv(request: Request) -> Response:
        check_results(request)
        headers = FRESH | {"Content-Disposition": 'attachment; filename="answers.csv"'}
        return Response(results.to_csv(store.ratings()), media_type="text/csv", headers=headers)

    def root(request: Request) -> Response:
        return PlainTextResponse("Open the link that you were given.", headers=HEADERS)

    return Starlette(
        routes=[
            Route("/", root),
            Route("/r/{token}/", page),
            Route("/r/{token}/state", state),
            Route("/r/{token}/answer", answer, methods=["POST"]),
            Route("/r/{token}/picture/{name}", picture),
            Route("/results/{token}/", show_results),
            Route("/results/{token}/answers.csv", answers_csv),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)],
    )


def parse(fields: Any) -> tuple[int, Mapping[str, str], float]:
    """Checks the types of a request: the position of a trial, answers by question, and seconds.

    Raises:
      UserError: a field is missing, unknown or of another type or range.
    """
    if not isinstance(fields, dict) or fields.keys() != {"position", "answers", "seconds"}:
        raise UserError("the request must be an object with position, answers and seconds")
    position, answers, seconds = (fields[name] for name in ("position", "answers", "seconds"))
    if type(position) is not int or not 0 <= position < 2**31:
        raise UserError(f"position is {str(position)[:20]}; allowed: a whole number from 0 up")
    if type(seconds) not in (int, float) or not 0 <= seconds <= MAX_SECONDS:
        raise UserError(f"seconds is {str(seconds)[:20]}; allowed: 0 to {MAX_SECONDS:.0f}")
    if not isinstance(answers, dict) or not all(isinstance(a, str) for a in answers.values()):
        raise UserError("answers must be an object of strings")
    return position, answers, float(seconds)


def _error(status: int, text: str) -> Response:
    return JSONResponse({"error": text}, status, headers=FRESH)


def serve(app: Starlette, bound: socket.socket) -> None:
    """Serves the application at a bound address until Ctrl-C."""
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level=logging.WARNING,  # access logs would hold the links
        lifespan="off",
        timeout_graceful_shutdown=3,
    )
    uvicorn.Server(config).run(sockets=[bound])
