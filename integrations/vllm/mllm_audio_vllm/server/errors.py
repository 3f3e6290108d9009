"""Refusals, in the form that OpenAI's clients understand."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

TYPES = {
    400: "BadRequestError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}


class RequestError(Exception):
    """A request that is answered with an error of one line."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param = status, param

    def body(self) -> dict[str, Any]:
        """Write it as JSON, as vLLM writes its own."""
        error = {
            "message": " ".join(str(self).split()),
            "type": TYPES.get(self.status, TYPES[400]),
            "param": self.param,
            "code": self.status,
        }
        return {"error": error}

    def response(self) -> JSONResponse:
        """Write it as a response."""
        return JSONResponse(self.body(), self.status)
