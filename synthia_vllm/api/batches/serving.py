"""The routes of files and batches. What they do on the disk is done in threads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final, Literal
from urllib.parse import urlsplit

from fastapi import Query
from fastapi.responses import FileResponse, Response
from python_multipart.exceptions import FormParserError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request

from synthia_vllm.api.batches.protocol import (
    Batch,
    BatchList,
    BatchRequest,
    DeletedFile,
    File,
    FileList,
)
from synthia_vllm.errors import BodyTooLarge, Forbidden, InvalidRequest
from synthia_vllm.http.body import ClientLeft, parse_body

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.types import Message, Receive

    from synthia_vllm.api.batches.store import Store
    from synthia_vllm.http.application import Application
    from synthia_vllm.http.state import ServerState

Limit = Annotated[int, Query(ge=1, le=10_000)]
_UPLOAD: Final = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file", "purpose"],
                "properties": {
                    "file": {"type": "string", "format": "binary"},
                    "purpose": {"type": "string", "enum": ["batch"]},
                },
            }
        }
    },
}
_METHODS: Final = ["GET", "POST", "DELETE"]
_MULTIPART_BYTES: Final = 64 * 1024
"""Of an upload, beside the file."""


class NoBatches(InvalidRequest):
    """This server takes none."""

    status = 404

    def __init__(self) -> None:
        super().__init__(
            "This server takes no files and no batches: its setting `batches.directory` is not "
            "set.",
            code="batches_off",
        )


def add_refusals(app: Application) -> None:
    """Say at the routes of files and batches why there are none."""

    @app.api_route("/v1/files{rest:path}", methods=_METHODS, include_in_schema=False)
    @app.api_route("/v1/batches{rest:path}", methods=_METHODS, include_in_schema=False)
    async def refuse(rest: str) -> None:
        raise NoBatches

    del refuse


def add_files(app: Application, state: ServerState, store: Store) -> None:
    """Add the routes of files."""
    limits = state.settings.batches

    @app.post("/v1/files", openapi_extra={"requestBody": _UPLOAD})
    async def upload(request: Request) -> File:
        """Keep a file of requests, for a batch: a form with `file` and `purpose`."""
        _require_own_page(request, state.settings.cors_origins)
        user = request.state.user
        form = await _form(request, limits.max_file_bytes)
        try:
            content, purpose = form.get("file"), form.get("purpose")
            if not isinstance(content, UploadFile):
                raise InvalidRequest(
                    "`file` is required: the file, as a part of the form with a file name.",
                    param="file",
                    code="missing_required_parameter",
                )
            if purpose != "batch":
                raise InvalidRequest(
                    f"`purpose` is {str(purpose)[:60]!r}; files here are for 'batch'.",
                    param="purpose",
                    code="invalid_value",
                )
            size = content.size or 0
            stored = await run_in_threadpool(store.stored_bytes, user)
            if stored + size > limits.max_stored_bytes:
                raise Forbidden(
                    f"Your files take {stored} bytes, of {limits.max_stored_bytes} that they may; "
                    f"this one has {size}. Delete some (DELETE /v1/files/ID).",
                    code="storage_used_up",
                )
            name = (content.filename or "input.jsonl")[:255]
            return await run_in_threadpool(store.add_file, user, name, content.file, size)
        finally:
            await form.close()

    @app.get("/v1/files")
    def files(
        request: Request,
        purpose: str | None = None,
        limit: Limit = 10_000,
        after: str | None = None,
        order: Literal["asc", "desc"] = "desc",
    ) -> FileList:
        """Your files."""
        found = [f for f in store.files(request.state.user) if purpose in (None, f.purpose)]
        return FileList(**_page(found if order == "desc" else found[::-1], limit, after))

    @app.get("/v1/files/{file_id}")
    def file(request: Request, file_id: str) -> File:
        """What is known of one of your files."""
        return store.file(request.state.user, file_id)

    @app.delete("/v1/files/{file_id}")
    def delete(request: Request, file_id: str) -> DeletedFile:
        """Forget one of your files."""
        store.delete_file(request.state.user, file_id)
        return DeletedFile(id=file_id)

    @app.get("/v1/files/{file_id}/content", response_class=Response)
    def content(request: Request, file_id: str) -> Response:
        """The lines of one of your files."""
        path = store.content(request.state.user, file_id)
        return FileResponse(path, media_type="application/jsonl")


def add_batches(app: Application, state: ServerState, store: Store) -> None:
    """Add the routes of batches."""

    @app.post("/v1/batches")
    async def create(request: Request, response: Response) -> Batch:
        """Have all requests in a file answered, when there is time."""
        asked = await parse_body(BatchRequest, state, request, response)
        paths = [route.path for route in app.generation]
        if asked.endpoint not in paths:
            raise InvalidRequest(
                f"`endpoint` is {asked.endpoint!r}; batches here are for {', '.join(paths)}.",
                param="endpoint",
                code="invalid_value",
            )
        user = request.state.user
        source = await run_in_threadpool(store.file, user, asked.input_file_id)
        return await run_in_threadpool(
            store.add_batch, user, source, asked.endpoint, asked.metadata
        )

    @app.get("/v1/batches")
    def batches(request: Request, limit: Limit = 20, after: str | None = None) -> BatchList:
        """Your batches."""
        return BatchList(**_page(store.batches(request.state.user), limit, after))

    @app.get("/v1/batches/{batch_id}")
    def batch(request: Request, batch_id: str) -> Batch:
        """How far one of your batches is."""
        return store.batch(request.state.user, batch_id)

    @app.post("/v1/batches/{batch_id}/cancel")
    def cancel(request: Request, batch_id: str) -> Batch:
        """End one of your batches; what was answered until then is kept."""
        return store.cancel(request.state.user, batch_id)

    app.bodies["/v1/batches"] = BatchRequest


def _require_own_page(request: Request, origins: Sequence[str]) -> None:
    """Raise `Forbidden` for another site's page: browsers send forms without asking first."""
    origin = request.headers.get("origin")
    own = origin is None or urlsplit(origin).netloc == request.headers.get("host")
    if not own and origin not in origins and "*" not in origins:
        raise Forbidden(
            "Pages of other origins may not send files here; the server's setting `cors_origins` "
            "lists those that may.",
            code="foreign_origin",
        )


def _page(found: Sequence[Any], limit: int, after: str | None) -> dict[str, Any]:
    """The part of a list that comes after the one with the id `after`."""
    start = next((n for n, it in enumerate(found, 1) if it.id == after), 0)
    data = found[start : start + limit]
    return {
        "data": list(data),
        "first_id": data[0].id if data else None,
        "last_id": data[-1].id if data else None,
        "has_more": len(found) > start + limit,
    }


async def _form(request: Request, most: int) -> Any:
    """The form in the body.

    Raises `InvalidRequest` if it is none, `BodyTooLarge` if too large, `ClientLeft` if it is cut.
    """
    bounded = Request(request.scope, _bounded(request.receive, most + _MULTIPART_BYTES, most))
    try:
        return await bounded.form(max_files=1, max_fields=8)
    except ClientDisconnect:
        raise ClientLeft from None
    except (HTTPException, MultiPartException, FormParserError):
        raise InvalidRequest("Send a form: `Content-Type: multipart/form-data`.") from None


def _bounded(receive: Receive, most: int, told: int) -> Receive:
    size = 0

    async def bounded() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > most:
            raise BodyTooLarge(told)
        return message

    return bounded
