"""The API's description at ``/openapi.json``: what FastAPI cannot know of routes of our own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from pydantic import BaseModel

    from synthia_vllm.http.application import Application


def attach(app: Application) -> None:
    """Describe the routes for text, and the bodies of those that read them themselves."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        known = app.openapi_schema is not None
        document = generate()
        if not known:
            _complete(document, app)
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend it


def _complete(document: dict[str, Any], app: Application) -> None:
    template = "#/components/schemas/{model}"
    schemas = document.setdefault("components", {}).setdefault("schemas", {})

    def reference(model: type[BaseModel], mode: Literal["validation", "serialization"]) -> Any:
        schema = model.model_json_schema(ref_template=template, mode=mode)
        schemas.update(schema.pop("$defs", {}) | {model.__name__: schema})
        return {"schema": {"$ref": template.format(model=model.__name__)}}

    for route in app.generation:
        content = {
            "application/json": reference(route.response, "serialization"),
            "text/event-stream": {},
        }
        document["paths"].setdefault(route.path, {})["post"] = {
            "summary": route.summary,
            "operationId": route.path.removeprefix("/v1/").replace("/", "_"),
            "responses": {"200": {"description": "The answer", "content": content}},
        }
    for path, model in {
        **{route.path: route.request for route in app.generation},
        **app.bodies,
    }.items():
        described = document["paths"][path]["post"]
        described["requestBody"] = {
            "required": True,
            "content": {"application/json": reference(model, "validation")},
        }
        described["responses"] = {
            "200": described["responses"]["200"],
            "4XX": {"description": "An error, in its API's envelope: what to change"},
            "5XX": {"description": "An error, in its API's envelope: the server cannot now"},
        }
