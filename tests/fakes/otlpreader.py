"""OTLP bodies as opentelemetry-proto reads them, which shares no code with their writer."""

import base64
from typing import Any

from google.protobuf import json_format
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

IDENTIFIERS = ("traceId", "spanId", "parentSpanId")


def read_traces(body: Any) -> ExportTraceServiceRequest:
    """A request to /v1/traces; unknown fields and wrong types raise ParseError."""
    request = ExportTraceServiceRequest()
    json_format.ParseDict(_as_protobuf(body), request)
    return request


def read_metrics(body: Any) -> ExportMetricsServiceRequest:
    """A request to /v1/metrics."""
    request = ExportMetricsServiceRequest()
    json_format.ParseDict(_as_protobuf(body), request)
    return request


def _as_protobuf(value: Any) -> Any:
    """Identifiers are hexadecimal in OTLP's JSON, and base64 in protobuf's own: its one
    difference that concerns these bodies (specification, "JSON Protobuf Encoding")."""
    if isinstance(value, dict):
        return {
            key: base64.b64encode(bytes.fromhex(each)).decode()
            if key in IDENTIFIERS
            else _as_protobuf(each)
            for key, each in value.items()
        }
    if isinstance(value, list):
        return [_as_protobuf(each) for each in value]
    return value
