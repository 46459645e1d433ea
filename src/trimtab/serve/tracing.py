"""OpenTelemetry traces: a span per request, with its route, status and request id, and no prompt or answer text.

OpenTelemetry's own environment variables say where they are sent: OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_SERVICE_NAME and
others. Requires `pip install 'trimtab[otel]'`.
"""

from __future__ import annotations

import os
from typing import Any

from fastapi import FastAPI

from trimtab.errors import TrimtabError

SILENT = "healthz,readyz,metrics"
"""Health checks and metrics, which machines request every few seconds."""


def make_tracer_provider() -> Any:
    """A tracer provider that sends spans in batches to the collector named in the environment.

    Raises:
        TrimtabError: OpenTelemetry isn't installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise TrimtabError("--otel needs OpenTelemetry: pip install 'trimtab[otel]'") from error
    named = Resource.create() if os.environ.get("OTEL_SERVICE_NAME") else Resource.create({SERVICE_NAME: "trimtab"})
    made = TracerProvider(resource=named)
    made.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return made


def trace(app: FastAPI, provider: Any) -> None:
    """Trace each request of an application in a span that continues the client's `traceparent`, if it sends one."""
    from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor

    def name(span: Any, scope: Any) -> None:
        if span is not None and span.is_recording():
            span.set_attribute("trimtab.request", scope.get("state", {}).get("request_id", ""))

    FastAPIInstrumentor.instrument_app(
        app,
        tracer_provider=provider,
        server_request_hook=name,
        excluded_urls=SILENT,
        exclude_spans=["receive", "send"],  # one per token of a stream
    )
