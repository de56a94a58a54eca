"""What a client is told when its request cannot be answered, in the shape that OpenAI's clients read."""

from typing import Any

from megatron_7b.errors import ConfigError

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """A request that is not answered.

    Args:
        status: Of HTTP.
        message: What is wrong, what was expected, how to fix it.
        param: Field of the request that is to blame.
        code: A word for programs.
        retry_after: Seconds after which trying again may help.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after = retry_after

    @property
    def content(self) -> dict[str, Any]:
        """The body of the reply."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the reply."""
        found = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return found | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def refusal(error: ConfigError, *, param: str | None = None) -> ApiError:
    """Return what a client is told of a request that the model cannot take."""
    message = error.args[0] if error.hint is None else f"{error.args[0]}; {error.hint}"
    is_too_long = "context is" in str(error.args[0])
    return ApiError(400, message, param=param, code="context_length_exceeded" if is_too_long else "invalid_request")


def stopping() -> ApiError:
    """Return what a client is told while the server stops."""
    return ApiError(503, "the server is stopping; send the request to another one", code="stopping", retry_after=30)


def not_expected() -> ApiError:
    """Return what a client is told of a failure of ours; the log has the rest."""
    return ApiError(500, "the server has failed to answer this request; its log says why", code="internal_error")
