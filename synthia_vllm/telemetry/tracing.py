"""Spans of requests for text, for OpenTelemetry.

vLLM brings the exporter, and its engine makes spans of its own; those here are their parents and,
where the client sends a ``traceparent``, children of the client's. Nothing in a span is anybody's
words.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from synthia_vllm import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping

_CONTEXT_HEADERS: Final = ("traceparent", "tracestate")  # https://www.w3.org/TR/trace-context/


class Tracer:
    """Makes the spans. Made once, imports OpenTelemetry."""

    def __init__(self) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation import tracecontext

        # Of no use until the engine has set up the exporter, and then at once.
        self._tracer = trace.get_tracer("synthia_vllm", __version__)
        self._context = tracecontext.TraceContextTextMapPropagator()

    def begin(self, headers: Mapping[bytes, bytes], route: str, operation: str) -> Span:
        """The span of a request with these headers, which begins now."""
        from opentelemetry.trace import SpanKind, set_span_in_context

        carrier = {
            name: headers[name.encode()].decode("latin-1")
            for name in _CONTEXT_HEADERS
            if name.encode() in headers
        }
        span = self._tracer.start_span(
            f"POST {route}",
            self._context.extract(carrier),
            SpanKind.SERVER,
            {
                "http.request.method": "POST",
                "http.route": route,
                "gen_ai.operation.name": operation,
            },
        )
        below: dict[str, str] = {}
        self._context.inject(below, set_span_in_context(span))
        return Span(span, below)


class Span:
    """The span of one request."""

    def __init__(self, span: Any, headers: dict[str, str]) -> None:
        self._span = span
        self.headers = headers
        """What makes a span elsewhere a child of this one."""

    def end(self, status: int, error: str | None, attributes: Mapping[str, Any]) -> None:
        """The request is over, with this HTTP status and, perhaps, an error's code.

        Attributes that are `None` or empty say nothing and are left out.
        """
        from opentelemetry.trace import StatusCode

        told = {"http.response.status_code": status, "error.type": error, **attributes}
        self._span.set_attributes(
            {name: it for name, it in told.items() if it not in (None, "", ())}
        )
        # By OpenTelemetry's conventions a server's span fails if the server does, not its client.
        if status >= 500 or (error is not None and status == 200):
            self._span.set_status(StatusCode.ERROR)
        self._span.end()
