"""What every service runs in: decode, authorise, handle, encode, count."""

from nexus.runtime.account import Account
from nexus.runtime.authority import Authority, Outcome
from nexus.runtime.call import Call, Deferred, Refusal
from nexus.runtime.config import TRACE_SEED_SIZE, ServiceConfig
from nexus.runtime.server import BINDS_MAX, ONE_SHOTS_MAX, Remark, Server, Service, serve

__all__ = [
    "BINDS_MAX",
    "ONE_SHOTS_MAX",
    "TRACE_SEED_SIZE",
    "Account",
    "Authority",
    "Call",
    "Deferred",
    "Outcome",
    "Refusal",
    "Remark",
    "Server",
    "Service",
    "ServiceConfig",
    "serve",
]
