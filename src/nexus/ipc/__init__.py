"""Calls to other services: correlation, deadlines, budgets, bounded retry, routes, bulk data.

State machines without I/O, and thin drivers that await ABI traps and nothing else. Outcomes are
values; a result that nobody looks at is a type-checker error.
"""

from nexus.ipc.buffer import Push, ReplyBuffer
from nexus.ipc.bulk import BULK_SIZE_MAX, Bulk, BulkFault, accept_bulk, offer_bulk
from nexus.ipc.calls import call_until, may_repeat
from nexus.ipc.context import Context, Spans
from nexus.ipc.correlate import GENERATION_ANY, Correlator, Peer, Pending, Verdict
from nexus.ipc.deadline import deadline_after, nested_deadline
from nexus.ipc.exchange import CALL_MISMATCHES, Answer, Caller, Exchange, Parent, Started
from nexus.ipc.nonce import NonceGen, NonceMismatchBudget
from nexus.ipc.oneshots import OneShots
from nexus.ipc.outcome import (
    CallFailure,
    Closed,
    Denied,
    Malformed,
    MismatchBudgetExceeded,
    NotFound,
    Refused,
    Routed,
    RouteFailure,
    RouteRetryOutcome,
    Stale,
    TimedOut,
    Unknown,
)
from nexus.ipc.peers import CONTROL_TERMS, Client, Peers, Way
from nexus.ipc.poster import OUTSTANDING_MAX, TAKEN_MAX, Posted, Poster
from nexus.ipc.retry import Retry, RetryBudget, RetryTokens, retry_until
from nexus.ipc.route import ROUTE_MISMATCHES, RouteAttempt, route_with_nonce_budgeted

__all__ = [
    "BULK_SIZE_MAX",
    "CALL_MISMATCHES",
    "CONTROL_TERMS",
    "GENERATION_ANY",
    "OUTSTANDING_MAX",
    "ROUTE_MISMATCHES",
    "TAKEN_MAX",
    "Answer",
    "Bulk",
    "BulkFault",
    "CallFailure",
    "Caller",
    "Client",
    "Closed",
    "Context",
    "Correlator",
    "Denied",
    "Exchange",
    "Malformed",
    "MismatchBudgetExceeded",
    "NonceGen",
    "NonceMismatchBudget",
    "NotFound",
    "OneShots",
    "Parent",
    "Peer",
    "Peers",
    "Pending",
    "Posted",
    "Poster",
    "Push",
    "Refused",
    "ReplyBuffer",
    "Retry",
    "RetryBudget",
    "RetryTokens",
    "RouteAttempt",
    "RouteFailure",
    "RouteRetryOutcome",
    "Routed",
    "Spans",
    "Stale",
    "Started",
    "TimedOut",
    "Unknown",
    "Verdict",
    "Way",
    "accept_bulk",
    "call_until",
    "deadline_after",
    "may_repeat",
    "nested_deadline",
    "offer_bulk",
    "retry_until",
    "route_with_nonce_budgeted",
]
