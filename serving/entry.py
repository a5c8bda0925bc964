"""What stands between the socket and the application, put together from the settings: protocol, TLS, front, CORS, guard, rates."""

from __future__ import annotations

import asyncio
import itertools
import logging
import resource
import ssl
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from registry.settings import Settings
from serving.access.auth import Guard, Rules
from serving.access.keyring import Keyring
from serving.access.rates import Limiter
from serving.access.rates_shared import SharedBuckets
from serving.api import Application
from serving.http import request_ids
from serving.http.accesslog import AccessLog
from serving.http.cors import Cors
from serving.http.endpoints import templates
from serving.http.front import Front, HttpCounts
from serving.http.protocol import bounded_protocol
from serving.http.tls import Certificates
from serving.state import Serving

log = logging.getLogger("modelkeep.serve")

FIRST_NUMBER = 2 * 10**12
"""The ids of what is no inference count from here, so that none is that of one."""
SPARE_DESCRIPTORS = 128
"""Kept for files, the registry, Redis and models."""


def equip(serving: Serving, settings: Settings) -> None:
    """Give the server its counts, its access log and the rates of its keys. Call it in the event loop."""
    if settings.monitoring.prometheus_enabled:
        serving.http = HttpCounts()
    serving.access = open_log(settings)
    if serving.access is not None:
        serving.access.start()
    shared = None
    if settings.redis_url is not None:
        shared = SharedBuckets(
            settings.redis_url, settings.environment, timeout_seconds=settings.cache.redis_timeout_seconds
        )
        shared.start()
    serving.limiter = Limiter(settings.security.rate, shared=shared)


async def end(serving: Serving) -> None:
    """Write the last lines, close what is open."""
    if serving.access is not None:
        await asyncio.to_thread(serving.access.end)
    if serving.limiter is not None and isinstance(serving.limiter.shared, SharedBuckets):
        await serving.limiter.shared.stop()


def open_log(settings: Settings) -> AccessLog | None:
    """The access log as the settings want it; None where they want none."""
    wanted = settings.logging
    if wanted.access == "off":
        return None
    return AccessLog(
        wanted.directory / wanted.access_file if wanted.access == "file" else None,
        max_bytes=wanted.access_max_mb << 20,
        files=wanted.access_files,
        share=wanted.access_share,
    )


def guarded(app: Application, serving: Serving, settings: Settings, keyring: Keyring, rules: Rules) -> Front:
    """The application with all that stands in front of it."""
    template = templates(app.pages.routes, rules.aliases)
    found: ASGIApp = Guard(
        app, keyring, rules, failures=serving.auth_failures, limiter=serving.limiter, template=template
    )
    if rules.origins:
        found = Cors(found, rules.origins)
    prefix, numbers = request_ids.prefix(serving.replica_id, serving.boot_id), itertools.count(FIRST_NUMBER)
    return Front(
        found,
        name=lambda: prefix + b"0.-.%d" % next(numbers),
        template=template,
        counts=serving.http,
        log=serving.access,
        timed=settings.server.response_time_header,
    )


def config(app: Front, settings: Settings, tls: Certificates | None) -> uvicorn.Config:
    """uvicorn's configuration: the limits of the protocol, TLS where there are certificates."""
    server = settings.server
    protocol = bounded_protocol(
        server.request_timeout_seconds,
        write_timeout_seconds=server.write_timeout_seconds,
        max_header_bytes=server.max_header_bytes,
        max_headers=server.max_headers,
        max_url_bytes=server.max_url_bytes,
        max_connections=connections(server.max_connections),
        refused=app.refuse,
    )
    made = uvicorn.Config(
        app,
        loop="none",
        http=protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=max(1, round(server.keep_alive_seconds)),
        timeout_graceful_shutdown=int(server.drain_seconds),
    )
    made.load()
    made.ssl = tls.context if tls is not None else None
    return made


def connections(wanted: int) -> int:
    """How many connections this process can take: it may open as many files as the system allows it, some of which are no connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + SPARE_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < needed:
        raised = needed if hard == resource.RLIM_INFINITY else min(hard, needed)
        if raised > soft:
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    possible = max(1, soft - SPARE_DESCRIPTORS)
    log.warning(
        "server.max_connections = %d, but this process may open %d files: it takes %d connections; raise the limit (ulimit -n)",
        wanted,
        soft,
        possible,
    )
    return possible


def quiet_handshakes(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Whoever connects without speaking TLS, or trusts us not, is no fault of ours: he gets no stack trace in the log."""
    error = context.get("exception")
    if isinstance(error, ssl.SSLError | ConnectionError | TimeoutError):
        log.debug("a connection ended before it was one: %s", error)
        return
    loop.default_exception_handler(context)
