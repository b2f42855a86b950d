"""OpenAI's files and batches as this server speaks them.

Source: OpenAI's API reference for files and batches, and the batch file format in it.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from synthia_vllm.generate.protocol import MAX_METADATA, RequestBody, at_most

MAX_ERRORS: Final = 100
"""Faulty lines that are told of one batch; who has more has one fault many times."""

Status = Literal[
    "validating",
    "failed",
    "in_progress",
    "finalizing",
    "completed",
    "expired",
    "cancelling",
    "cancelled",
]
ENDED: Final[frozenset[str]] = frozenset(("failed", "completed", "expired", "cancelled"))


class File(BaseModel):
    """A file of lines: what a batch is asked, or what came of it."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed"] = "processed"


class DeletedFile(BaseModel):
    """The answer to a deletion."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class FileList(BaseModel):
    """A page of files, newest first."""

    object: Literal["list"] = "list"
    data: list[File]
    first_id: str | None
    last_id: str | None
    has_more: bool


class BatchRequest(RequestBody):
    """The body of ``POST /v1/batches``."""

    input_file_id: str = Field(max_length=64)
    endpoint: str = Field(max_length=64)
    completion_window: Literal["24h"]
    metadata: Annotated[dict[str, str] | None, at_most(MAX_METADATA)] = None


class RequestCounts(BaseModel):
    """How far a batch is, in lines."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class BatchError(BaseModel):
    """Why a batch cannot run, or what keeps it waiting."""

    code: str
    message: str
    line: int | None = None
    """Of the input, from 1."""
    param: str | None = None


class BatchErrors(BaseModel):
    """All of them, up to `MAX_ERRORS`."""

    object: Literal["list"] = "list"
    data: list[BatchError]


class Batch(BaseModel):
    """A file of requests on its way; times are seconds since 1970."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    errors: BatchErrors | None = None
    input_file_id: str
    completion_window: Literal["24h"] = "24h"
    status: Status = "validating"
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts = Field(default_factory=RequestCounts)
    metadata: dict[str, str] | None = None


class BatchList(BaseModel):
    """A page of batches, newest first."""

    object: Literal["list"] = "list"
    data: list[Batch]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Line(BaseModel):
    """One line of a batch's input."""

    model_config = ConfigDict(strict=True, frozen=True)

    custom_id: str = Field(min_length=1, max_length=512)
    method: Literal["POST"]
    url: str
    body: dict[str, Any]

    @property
    def places(self) -> int:
        """Answers it asks for, as far as can be told before it is looked at."""
        n, prompt = self.body.get("n"), self.body.get("prompt")
        prompts = prompt if isinstance(prompt, list) else []
        several = len(prompts) if prompts and not isinstance(prompts[0], int) else 1
        return max(1, (n if isinstance(n, int) else 1) * several)


class LineResponse(BaseModel):
    """What the route said."""

    status_code: int
    request_id: str
    body: Any


class LineError(BaseModel):
    """Why there is no response."""

    code: str
    message: str


class LineResult(BaseModel):
    """One line of a batch's output, or of its errors."""

    id: str
    custom_id: str
    response: LineResponse | None
    error: LineError | None = None
