"""The application: endpoints, errors and the life of the engine behind them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from lmsleep.serve import chat, conversations, memories, responses
from lmsleep.serve.context import Context, Who
from lmsleep.serve.errors import ApiError, not_found
from lmsleep.serve.gate import Gate
from lmsleep.serve.leaving import end
from lmsleep.text.tokenizers import Spelled

PAGE = Path(__file__).parent / "page"
PATIENCE = 60  # seconds that may pass until what has begun has come to its end
GUARD = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}  # the page asks nothing of any other server, whatever is written into it


def create_app(here: Context) -> FastAPI:
    """Return the application around a service whose engine has not been started."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        here.service.start()
        here.reader.take_up()
        yield
        here.ready = False
        if here.running:  # responses in the background come to their end, as all others have
            await asyncio.wait(list(here.running.values()), timeout=PATIENCE)
        await here.reader.pause()
        await end(here.running.values())
        await here.service.stop()

    # Without FastAPI's own pages, whose scripts come from elsewhere; the schema is at /openapi.json.
    app = FastAPI(title="lmsleep", version=version("lmsleep"), lifespan=life, docs_url=None, redoc_url=None)
    app.state.context = here
    app.add_middleware(Gate)
    for part in (chat, responses, conversations, memories):
        app.include_router(part.router)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _not_valid)
    app.add_exception_handler(HTTPException, _http_error)

    @app.get("/v1/models", tags=["models"])
    async def models(who: Who) -> dict[str, Any]:
        """List the model, under all its names."""
        return {"object": "list", "data": [_model(here, name) for name in here.names]}

    @app.get("/v1/models/{model:path}", tags=["models"])
    async def model(model: str, who: Who) -> dict[str, Any]:
        """Describe the model."""
        if model not in here.names:
            raise not_found("model", model, param="model")
        return _model(here, model)

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        """Return the page."""
        return FileResponse(PAGE / "index.html", headers=GUARD)

    app.mount("/page", StaticFiles(directory=PAGE))

    @app.get("/health", tags=["operations"])
    async def health() -> JSONResponse:
        """Say that the process is there and its engine runs."""
        if here.service.engine.failed:
            return JSONResponse({"status": "failed"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/ready", tags=["operations"])
    async def ready() -> JSONResponse:
        """Say whether requests are taken and can be stored, and if not, why."""
        reason = None if here.ready else "draining"
        if reason is None:
            try:
                await asyncio.to_thread(here.service.store.check_writable)
            except ApiError as error:
                reason = error.body["code"]
        return JSONResponse({"ready": reason is None, "reason": reason}, 200 if reason is None else 503)

    @app.get("/version", tags=["operations"])
    async def told_version() -> dict[str, str]:
        """Tell the version."""
        return {"version": version("lmsleep")}

    @app.get("/metrics", tags=["operations"])
    async def metrics() -> Response:
        """Tell what Prometheus scrapes."""
        return Response(here.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


def _model(here: Context, name: str) -> dict[str, Any]:
    sleep, tokenizer = here.service.engine.sleep, here.service.tokenizer
    said = {"id": name, "object": "model", "created": here.service.created, "owned_by": "lmsleep"}
    # The words of a task, which are all that a model of it can read.
    words = [*tokenizer.numbers] if isinstance(tokenizer, Spelled) else None
    about = {"window": sleep.window, "passes": sleep.passes, "words": words, "examples": here.examples}
    return {**said, **about}


async def _api_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return error.answer()


async def _not_valid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path"))
    said = f"{where}: {first['msg']}" if where else first["msg"]
    return ApiError(400, said, code="invalid_request", param=where or None).answer()


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    answer = ApiError(error.status_code, str(error.detail)).answer()
    answer.headers.update(error.headers or {})
    return answer
