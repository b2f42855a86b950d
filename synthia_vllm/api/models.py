"""The names that can be asked for: ``/v1/models``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, Field
from starlette.requests import Request  # noqa: TC002  # FastAPI reads the routes' annotations

from synthia_vllm.errors import Unavailable, UnknownModel
from synthia_vllm.generate.protocol import absent

if TYPE_CHECKING:
    from synthia_vllm.http.application import Application
    from synthia_vllm.http.state import ServerState


class ModelCard(BaseModel):
    """One name in the list of models."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    root: str
    max_model_len: int | None
    examples: list[str] | None = Field(None, exclude_if=absent)
    """Questions that the model was made to answer, if it knows no others."""


class ModelList(BaseModel):
    """The body of ``GET /v1/models``."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


def attach(app: Application, state: ServerState) -> None:
    """Add the routes."""
    settings = state.settings

    def card(name: str) -> ModelCard:
        try:
            model_info = state.engine.model_info
        except Unavailable:
            model_info = None
        return ModelCard(
            id=name,
            created=state.created,
            owned_by="synthia-vllm",
            root=settings.resolved_model,
            max_model_len=model_info.max_model_len if model_info else None,
            examples=list(model_info.examples) or None if model_info else None,
        )

    def names_for(request: Request) -> list[str]:
        """The served names that this request's user may use."""
        user = request.state.user
        return [name for name in settings.served if state.admission.may_use(user, name)]

    @app.get("/v1/models")
    async def models(request: Request) -> ModelList:
        """The models you may use; each preset is a name of its own."""
        return ModelList(data=[card(name) for name in names_for(request)])

    @app.get("/v1/models/{name:path}")
    async def model(name: str, request: Request) -> ModelCard:
        """One model."""
        if name not in names_for(request):
            raise UnknownModel(name, tuple(names_for(request)))
        return card(name)
