"""The OpenAPI document: FastAPI's, with every route's body and answers as they are."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

_REF = "#/components/schemas/{model}"
_ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_CHOICES = {"type": "array", "items": {"type": "object", "required": ["index", "finish_reason"]}}
_ANSWER: dict[str, Any] = {
    "type": "object",
    "required": ["id", "object", "created", "model", "choices", "usage"],
    "properties": {"id": {"type": "string"}, "model": {"type": "string"}, "choices": _CHOICES},
}
_SCORES: dict[str, Any] = {"type": "object", "required": ["object", "model", "estimator", "is_exact", "data", "usage"]}
_REFUSED = {
    "description": "refused or failed, in OpenAI's shape",
    "content": {"application/json": {"schema": {"$ref": _REF.format(model="Error")}}},
}
ERRORS = {"4XX": _REFUSED, "5XX": _REFUSED}


def takes(kind: type[BaseModel], *, is_streamed: bool = True) -> dict[str, Any]:
    """A route's body and answers, for FastAPI's `openapi_extra`."""
    answer = {"application/json": {"schema": {"$ref": _REF.format(model="Answer" if is_streamed else "Scores")}}}
    if is_streamed:
        answer["text/event-stream"] = {"schema": {"type": "string"}}
    return {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": kind.model_json_schema(ref_template=_REF)}},
        },
        "responses": {"200": {"description": "the answer", "content": answer}, **ERRORS},
    }


class Api(FastAPI):
    """FastAPI with our document."""

    def openapi(self) -> dict[str, Any]:
        """Definitions of bodies stand among the components; a key is asked for where the endpoint has any."""
        if self.openapi_schema is None:
            document = get_openapi(
                title=self.title, version=self.version, description=self.description, routes=self.routes
            )
            components = document.setdefault("components", {})
            schemas = components.setdefault("schemas", {})
            schemas.update({"Error": _ERROR, "Answer": _ANSWER, "Scores": _SCORES})
            for path in document["paths"].values():
                for operation in path.values():
                    for content in operation.get("requestBody", {}).get("content", {}).values():
                        schemas.update(content["schema"].pop("$defs", {}))
                    operation["responses"].pop("422", None)  # ours are 400
            components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            document["security"] = [{}, {"key": []}]
            self.openapi_schema = document
        return self.openapi_schema
