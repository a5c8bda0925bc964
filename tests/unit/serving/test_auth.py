"""The guard: who may do what, on every endpoint there is; headers and paths that try to be two things at once."""

from __future__ import annotations

import asyncio
import base64
import datetime as dt
import logging
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import pytest
from fastapi.routing import APIRoute
from starlette.routing import Route as PlainRoute

from registry import keys
from registry.actor import Who
from registry.connect import open_database
from registry.keys import Role, StoredKey
from registry.rates import Rate
from registry.settings import Settings
from registry.store import open_store
from serving import child
from serving.access.auth import ANONYMOUS, Guard, Rules, is_local, role_needed
from serving.access.keyring import Keyring
from serving.access.rates import Limiter
from serving.api import create_app
from serving.follow.reconcile import Reconciler
from serving.state import Serving
from serving.traffic.capture import Capture
from serving.views import pages

ADDRESS = "http://127.0.0.1:8000"
NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
LATER = NOW + dt.timedelta(days=1)
INTERNAL_SECRET = "ab" * 32
INTERNAL = keys.internal_text(INTERNAL_SECRET, ADDRESS)
Headers = dict[str, str] | list[tuple[str, str]]


def text(name: str) -> str:
    """The key of somebody, made of his name."""
    return f"mk_{name.encode().hex():0<12.12}_{name * 43:.43}"


def stored(name: str, role: str, *, expires_at: dt.datetime | None = None, revoked: bool = False) -> StoredKey:
    return StoredKey(text(name)[3:15], name, role, keys.digest(text(name)[16:]), expires_at, revoked)


KNOWN = [
    stored("viewer", "view"),
    stored("sender", "infer"),
    stored("admin", "operate"),
    stored("gone", "operate", revoked=True),
    stored("brief", "view", expires_at=LATER),
    StoredKey("internal", "internal", "internal", INTERNAL_SECRET, None, False),
]
BY_ROLE: dict[Role | None, str | None] = {
    None: None,
    "view": text("viewer"),
    "infer": text("sender"),
    "operate": text("admin"),
}


@dataclass
class Asked:
    """A guard in front of an application that notes what reaches it."""

    guard: Guard
    reached: list[dict[str, Any]] = field(default_factory=list)
    status: int = 0
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    messages: list[Any] = field(default_factory=list)

    @property
    def error(self) -> str:
        document = orjson.loads(self.body)
        assert list(document) == ["error"]
        return str(document["error"])

    @property
    def who(self) -> Who:
        who = self.reached[-1]["state"]["who"]
        assert isinstance(who, Who)
        return who

    def __call__(
        self, method: str, path: str, key: str | None = None, headers: Headers | None = None, kind: str = "http"
    ) -> int:
        """The status; 200 where the request came through."""
        lines = list(headers.items() if isinstance(headers, dict) else headers or [])
        if key is not None:
            lines.append(("X-API-Key", key))
        scope = {
            "type": kind,
            "path": path,
            "root_path": "",
            "query_string": b"",
            "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in lines],
            "client": ("10.0.0.7", 5),
            "state": {},
        }
        if kind == "http":
            scope["method"] = method
        self.messages = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            self.messages.append(message)

        asyncio.run(self.guard(scope, receive, send))
        if kind != "http":
            return 0
        self.status = self.messages[0]["status"]
        self.headers = {name.decode(): value.decode() for name, value in self.messages[0]["headers"]}
        self.body = b"".join(message.get("body", b"") for message in self.messages[1:])
        return self.status


def ring(*, known: Iterable[StoredKey] | None = KNOWN, now: dt.datetime = NOW) -> Keyring:
    made = Keyring(Path("/nowhere/keys.json"), ADDRESS, now=lambda: now)
    if known is not None:
        made.install(known, ("epoch", 1))
    return made


def guarded(rules: Rules | None = None, keyring: Keyring | None = None, **options: Any) -> Asked:
    reached: list[dict[str, Any]] = []

    async def app(scope: Any, _receive: Any, send: Any) -> None:
        reached.append(scope)
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

    return Asked(Guard(app, keyring or ring(), rules or Rules(local=False), **options), reached)


# --- every endpoint

VIEW, INFER, OPERATE = "view", "infer", "operate"
OPEN = None
MATRIX: dict[tuple[str, str], str | None] = {
    ("GET", "/"): OPEN,
    ("GET", "/health"): OPEN,
    ("GET", "/metrics"): VIEW,
    ("GET", "/docs"): VIEW,
    ("GET", "/openapi.json"): VIEW,
    ("GET", "/api/v2/model-info"): VIEW,
    ("GET", "/api/v2/model-health"): VIEW,
    ("POST", "/api/v2/update-models"): OPERATE,
    ("POST", "/v1/generate"): INFER,
    ("POST", "/v1/completions"): INFER,
    ("GET", "/v1/models"): INFER,
    ("GET", "/v1/models/{model}"): INFER,
    ("GET", "/api/v2/promotions"): VIEW,
    ("GET", "/api/v2/promotions/{promotion}"): VIEW,
    ("POST", "/api/v2/promotions/{promotion}/approve"): OPERATE,
    ("POST", "/api/v2/promotions/{promotion}/reject"): OPERATE,
    ("POST", "/api/v2/promotions/{promotion}/pause"): OPERATE,
    ("POST", "/api/v2/promotions/{promotion}/resume"): OPERATE,
    ("POST", "/api/v2/promotions/{promotion}/advance"): OPERATE,
    ("POST", "/api/v2/promotions/{promotion}/stop"): OPERATE,
    ("GET", "/api/v2/captured"): VIEW,
    ("GET", "/api/v2/captured/{model}"): OPERATE,
    ("DELETE", "/api/v2/captured/{model}"): OPERATE,
    ("POST", "/api/v2/feedback"): INFER,
    ("POST", "/api/v2/rollback"): OPERATE,
    ("DELETE", "/api/v2/rollback/{model}"): OPERATE,
    ("GET", "/api/v2/rollback/{model}"): VIEW,
    ("GET", "/api/cache/stats"): VIEW,
    ("DELETE", "/api/cache"): OPERATE,
    ("GET", "/api/gpu/profile"): VIEW,
    ("GET", "/api/gpu/optimization-report"): VIEW,
    ("GET", "/v2"): VIEW,
    ("GET", "/v2/health/live"): OPEN,
    ("GET", "/v2/health/ready"): OPEN,
    ("GET", "/v2/models/{model}[/versions/{version}]"): VIEW,
    ("GET", "/v2/models/{model}[/versions/{version}]/ready"): VIEW,
    ("GET", "/v2/models/{model}[/versions/{version}]/config"): VIEW,
    ("GET", "/v2/models/{model}[/versions/{version}]/stats"): VIEW,
    ("POST", "/v2/models/{model}[/versions/{version}]/infer"): INFER,
    ("POST", "/v2/repository/index"): VIEW,
    ("POST", "/v2/repository/models/{model}/load"): OPERATE,
    ("POST", "/v2/repository/models/{model}/unload"): OPERATE,
}
"""What each endpoint needs. A new one is written here, or the next test fails."""


def reconciler(folder: Path) -> Reconciler:
    """One that is never started."""
    settings = Settings(home=folder, profile="cpu")
    serving = Serving(environment="production", replica_id="box", boot_id="boot")
    serving.capture = Capture(folder / "captured", settings.capture)
    return Reconciler(
        serving, settings, open_database(settings), open_store(settings.artifacts), state_folder=folder, address=ADDRESS
    )


def endpoints(folder: Path) -> set[tuple[str, str]]:
    """Everything that the server answers, as the child puts it together."""
    made = reconciler(folder)
    app = create_app(
        made.serving, settings=made.settings, nudge=made.nudge, info=made.info, routers=child.routers(made)
    )
    found = {(method, path) for method, path, _ in pages._V2_PATHS}
    for route in flat(app.pages.routes):
        assert isinstance(route, APIRoute | PlainRoute), f"{route}: say here what it needs"
        found |= {(method, route.path) for method in (route.methods or ()) if method != "HEAD"}
    return found


def flat(routes: Iterable[Any]) -> Iterable[Any]:
    """Routes, those of routers that were included among them."""
    for route in routes:
        included = getattr(route, "original_router", None)
        yield from [route] if included is None else flat(included.routes)


def test_every_endpoint_has_its_role(tmp_path: Path) -> None:
    assert endpoints(tmp_path) == set(MATRIX)


def paths(template: str) -> list[str]:
    forms = [template.replace("[/versions/{version}]", part) for part in ("", "/versions/7")]
    return sorted({form.replace("{model}", "m").replace("{promotion}", "p") for form in forms})


@pytest.mark.parametrize(("method", "template"), sorted(MATRIX))
def test_each_role_may_what_the_table_says(method: str, template: str) -> None:
    needed = MATRIX[method, template]
    for path in paths(template):
        for role, key in BY_ROLE.items():
            ask = guarded()
            status = ask(method, path, key)
            if needed is None or (role is not None and keys.allows(role, needed)):  # type: ignore[arg-type]
                assert (status, len(ask.reached)) == (200, 1), (path, role)
            else:
                assert (status, ask.reached) == (401 if role is None else 403, []), (path, role)


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE", "TRACE", "CONNECT", "POST", "post", "get", "NONSENSE"])
def test_what_nobody_thought_of_needs_the_most(method: str) -> None:
    for path in ("/", "/health", "/v2/health/live", "/metrics", "/new", "/v2/models/m"):
        assert role_needed(method, path) == "operate"


@pytest.mark.parametrize(
    "path",
    ["//v2/health/live", "/v2/health/live/", "/V2/health/live", "/v2//health/live", "/health/", "/healthy", "", "*",
     "/favicon.ico/../metrics", "/v2/health/../models", "http://evil/health", "/v2/health/ready/x", "/%2e", "/health;x"],
)  # fmt: skip
def test_only_the_very_paths_are_open(path: str) -> None:
    assert guarded()("GET", path) == 401


@pytest.mark.parametrize(
    "path",
    ["/api/v2/promotions/infer", "/api/v2/promotions/x/infer", "//v2/models/m/infer", "/V2/models/m/infer",
     "/v2/repository/models/m/infer", "/v2x/models/m/infer", "/api/v2/update-models/infer", "/v2/models/m/infer/x"],
)  # fmt: skip
def test_what_only_looks_like_inference_needs_an_operator(path: str) -> None:
    assert role_needed("POST", path) == "operate"


def test_a_path_that_reads_as_inference_reaches_nothing_else(tmp_path: Path) -> None:
    """Whatever the guard lets through for `infer` goes to the V2 protocol, which has nothing there but inference."""
    made = reconciler(tmp_path)
    app = create_app(made.serving, settings=made.settings, nudge=made.nudge, info=made.info)
    keyring = ring()
    for path in (
        "/v2/models/../../api/v2/update-models/infer",
        "/v2/models/infer",
        "/v2/models/a/b/c/d/infer",
        "/v2/models/m/infer/",
    ):
        ask = Asked(Guard(app, keyring, Rules(local=False)))
        assert ask("POST", path, text("sender")) in (400, 404, 405), path
        assert made.serving.generation == 0


def test_options_and_head_read_and_no_more() -> None:
    for method in ("HEAD", "OPTIONS"):
        assert guarded()(method, "/metrics") == 401
        assert guarded()(method, "/metrics", text("viewer")) == 200
    assert guarded()("HEAD", "/health") == 200
    assert guarded()("OPTIONS", "/health") == 401


# --- keys


def basic(password: str) -> str:
    return "Basic " + base64.b64encode(f"prometheus:{password}".encode()).decode()


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {text('viewer')}"},
        {"authorization": f"bEaReR  {text('viewer')} "},
        {"X-API-Key": f" {text('viewer')}"},
        {"Authorization": basic(text("viewer"))},
        {"Authorization": f"Bearer {text('viewer')}", "X-API-Key": text("viewer")},
    ],
)
def test_a_key_may_come_in_any_of_these_ways(headers: dict[str, str]) -> None:
    ask = guarded()
    assert ask("GET", "/metrics", headers=headers) == 200
    assert ask.who == Who("key:viewer", key_id=text("viewer")[3:15], via="api")
    assert ask.reached[0]["state"]["role"] == "view"


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": text("viewer")},
        {"Authorization": f"Digest {text('viewer')}"},
        {"Authorization": "Bearer"},
        {"Authorization": ""},
        {"Authorization": f"Basic {text('viewer')}"},
        {"Authorization": "Basic \xff\xfe"},
        {"Authorization": basic("")},
        {"X-API-Key": ""},
        {"X-API-Key": text("viewer") + "x" * 100_000},
        {"X-API-Key": text("viewer")[:-1] + "\xe9"},
        {"X-API-Key": f"{text('viewer')}, {text('admin')}"},
        {"X-API-Key": text("nobody")},
        {"X-API-Key": keys.internal_text("cd" * 32, ADDRESS)},
        {"X-API-Key": keys.internal_text(INTERNAL_SECRET, "http://127.0.0.1:8001")},
        {"X-API-Key": INTERNAL[:-1]},
        {"X-API-Key": "mki_"},
        {"X-API-Key": f"mk_internal_{INTERNAL_SECRET}"},
    ],
)
@pytest.mark.parametrize("rules", [Rules(local=False), Rules(local=True)])
def test_a_wrong_key_is_refused_wherever_and_never_repeated(headers: dict[str, str], rules: Rules) -> None:
    ask = guarded(rules)
    assert ask("GET", "/metrics", headers=headers) == 401
    assert ask.reached == []
    assert ask.headers["www-authenticate"] == 'Bearer realm="modelkeep"'
    assert "modelkeep keys create NAME --role view" in ask.error
    assert text("viewer")[16:30] not in ask.error


@pytest.mark.parametrize(
    "headers",
    [
        [("Authorization", f"Bearer {text('viewer')}"), ("Authorization", f"Bearer {text('admin')}")],
        [("Authorization", f"Bearer {text('admin')}"), ("AUTHORIZATION", f"Bearer {text('admin')}")],
        [("X-API-Key", text("viewer")), ("X-API-Key", text("admin"))],
        [("Authorization", f"Bearer {text('viewer')}"), ("X-API-Key", text("admin"))],
        [("Host", "127.0.0.1"), ("Host", "evil.example")],
        [("Origin", "http://127.0.0.1"), ("Origin", "http://evil.example")],
    ],
)
@pytest.mark.parametrize("rules", [Rules(local=False), Rules(local=True)])
def test_headers_that_can_be_read_in_two_ways_are_refused(headers: list[tuple[str, str]], rules: Rules) -> None:
    ask = guarded(rules)
    assert ask("POST", "/api/v2/update-models", headers=headers) == 400
    assert ask.reached == []


def test_an_expired_or_revoked_key_says_so() -> None:
    ask = guarded()
    assert ask("GET", "/metrics", text("gone")) == 401
    assert "was revoked" in ask.error
    assert ask("GET", "/metrics", text("brief")) == 200
    ask = guarded(keyring=ring(now=LATER))
    assert ask("GET", "/metrics", text("brief")) == 401
    assert "has expired" in ask.error


def test_a_role_that_does_not_suffice_is_told_which_would() -> None:
    ask = guarded()
    assert ask("POST", "/v2/models/m/infer", text("viewer")) == 403
    assert ask.error == "key viewer has role view, this needs infer: modelkeep keys create NAME --role infer"


def test_a_key_that_is_revoked_is_refused_at_its_next_request() -> None:
    keyring = ring()
    ask = guarded(keyring=keyring)
    assert ask("GET", "/metrics", text("viewer")) == 200
    keyring.install([stored("viewer", "view", revoked=True)], ("epoch", 2))
    assert ask("GET", "/metrics", text("viewer")) == 401
    keyring.install(KNOWN, ("epoch", 3))
    assert ask("GET", "/metrics", text("viewer")) == 200


def test_without_any_key_the_remedy_is_how_to_make_the_first() -> None:
    ask = guarded(keyring=ring(known=[stored("gone", "operate", revoked=True)]))
    assert ask("POST", "/v2/models/m/infer") == 401
    assert "no key exists yet: make one with: modelkeep keys create NAME --role infer" in ask.error


def test_before_any_key_is_known_the_server_says_that_it_cannot_tell() -> None:
    ask = guarded(keyring=ring(known=None))
    assert ask("GET", "/metrics", text("viewer")) == 503
    assert "the registry has not answered" in ask.error
    assert ask.headers["retry-after"] == "1"
    assert ask("GET", "/health") == 200


def test_our_own_processes_read_infer_nudge_and_fetch_captured_requests_and_do_nothing_else() -> None:
    ask = guarded()
    assert ask("GET", "/api/v2/model-info", INTERNAL) == 200
    assert ask("POST", "/v2/models/m/infer", INTERNAL) == 200
    assert ask("POST", "/api/v2/update-models", INTERNAL) == 200
    assert ask("POST", "/api/v2/promotions/p/approve", INTERNAL) == 403
    assert ask("PUT", "/api/v2/update-models", INTERNAL) == 403
    assert ask("GET", "/api/v2/captured/m", INTERNAL) == 200
    assert ask("DELETE", "/api/v2/captured/m", INTERNAL) == 403


# --- without a key


def test_on_this_machine_nobody_needs_a_key_unless_it_is_asked_for() -> None:
    ask = guarded(Rules(local=True))
    assert ask("POST", "/api/v2/promotions/p/approve") == 200
    assert ask.who == ANONYMOUS
    assert ask.reached[-1]["state"]["role"] == "operate"
    assert ask("POST", "/api/v2/promotions/p/approve", text("viewer")) == 403, "who shows a key is held to it"
    assert guarded(Rules(local=True, require_keys=True))("GET", "/metrics") == 401


@pytest.mark.parametrize(
    "header",
    ["X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Real-IP", "Forwarded", "Via", "x-forwarded-FOR"],
)
def test_what_a_proxy_passes_on_to_this_machine_needs_a_key(header: str) -> None:
    failures: dict[str, int] = {}
    ask = guarded(Rules(local=True), failures=failures)
    lines = [("Host", "127.0.0.1:8000"), (header, "203.0.113.9"), (header, "10.1.1.1")]
    for method, path in (("GET", "/metrics"), ("POST", "/v2/models/m/infer"), ("POST", "/api/v2/rollback")):
        assert ask(method, path, headers=lines) == 401
        assert "MODELKEEP_SECURITY__REQUIRE_KEYS=true" in ask.error and "ALLOW_UNAUTHENTICATED=true" in ask.error
        assert ask.reached == []
    assert failures == {"forwarded": 3}
    assert ask("POST", "/v2/models/m/infer", text("sender"), headers=lines) == 200
    assert ask("GET", "/metrics", text("nobody"), headers=lines) == 401
    for path in ("/health", "/v2/health/live", "/v2/health/ready"):
        assert ask("GET", path, headers=lines) == 200
    assert ask("GET", "/", headers=lines) == 200
    assert ask.reached[-1]["state"]["role"] is None, "it may know that a server is here, and not what it serves"


def test_a_proxy_that_decides_itself_who_may_come_in_is_believed() -> None:
    lines = [("Host", "models.example.org"), ("X-Forwarded-For", "203.0.113.9")]
    assert guarded(Rules(local=True, allow_unauthenticated=True))("GET", "/metrics", headers=lines) == 200
    closed = guarded(Rules(local=True, require_keys=True))
    assert closed("GET", "/metrics", headers=lines) == 401
    assert "asks for an API key" in closed.error
    assert closed("GET", "/metrics", text("viewer"), headers=lines) == 200


def test_a_websocket_through_a_proxy_needs_a_key() -> None:
    ask = guarded(Rules(local=True))
    ask("GET", "/v2/stream", headers={"Host": "127.0.0.1", "X-Forwarded-For": "203.0.113.9"}, kind="websocket")
    assert ask.reached == [] and ask.messages[0]["type"] == "websocket.close"


def test_what_stands_in_front_may_be_trusted_with_it() -> None:
    ask = guarded(Rules(local=False, allow_unauthenticated=True))
    assert ask("POST", "/api/v2/update-models", headers={"Host": "models.example.org"}) == 200
    assert ask("GET", "/metrics", headers={"Authorization": basic("the proxy's own")}) == 200
    assert ask.who == ANONYMOUS
    assert ask("GET", "/metrics", headers={"Authorization": f"Bearer {text('nobody')}"}) == 401
    assert ask("GET", "/metrics", text("admin")) == 200
    assert ask.who.actor == "key:admin"


def test_the_first_page_names_the_models_only_to_who_may_look(tmp_path: Path) -> None:
    made = reconciler(tmp_path)
    app = create_app(made.serving, settings=made.settings, nudge=made.nudge, info=made.info)
    ask = Asked(Guard(app, ring(), Rules(local=False)))
    assert ask("GET", "/") == 200
    assert set(orjson.loads(ask.body)) == {"name", "version", "documentation"}
    assert ask("GET", "/", text("viewer")) == 200
    assert "models" in orjson.loads(ask.body)
    assert ask("GET", "/", text("gone")) == 401


@pytest.mark.parametrize(
    "host", ["127.0.0.1:8000", "localhost:8000", "LOCALHOST", "[::1]:8000", "a.localhost:1", "127.8.8.8"]
)
def test_the_names_of_this_machine_are_answered(host: str) -> None:
    assert guarded(Rules(local=True))("GET", "/metrics", headers={"Host": host}) == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "", "10.0.0.7",
             "0.0.0.0:8000", "[::1", "127.0.0.1@evil.example", "xlocalhost"]
)  # fmt: skip
def test_a_name_that_was_made_to_point_here_is_not(host: str) -> None:
    ask = guarded(Rules(local=True))
    for method, path in (("GET", "/metrics"), ("POST", "/api/v2/update-models"), ("GET", "/")):
        assert ask(method, path, headers={"Host": host}) == 403
        assert "REQUIRE_KEYS" in ask.error
    assert ask("GET", "/metrics", text("viewer"), headers={"Host": host}) == 200
    assert ask("GET", "/health", headers={"Host": host}) == 200


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "https://127.0.0.1:9", "http://127.0.0.1", "", "file://"]
)
def test_a_page_of_another_origin_may_not_act(origin: str) -> None:
    ask = guarded(Rules(local=True))
    headers = {"Host": "127.0.0.1:8000", "Origin": origin}
    assert ask("POST", "/api/v2/update-models", headers=headers) == 403
    assert ask("DELETE", "/x", headers=headers) == 403
    assert ask.reached == []
    assert ask("GET", "/metrics", headers=headers) == 200, "it cannot read the answer: there are no CORS headers"
    # A browser adds Basic by itself; no browser adds these two for a page of another origin.
    assert ask("POST", "/x", headers={**headers, "Authorization": basic(text("admin"))}) == 403
    assert ask("POST", "/x", text("admin"), headers=headers) == 200
    assert ask("POST", "/x", headers={**headers, "Authorization": f"Bearer {text('admin')}"}) == 200


def test_pages_of_this_server_and_of_named_origins_may_act() -> None:
    own = {"Host": "127.0.0.1:8000", "Origin": "http://127.0.0.1:8000"}
    assert guarded(Rules(local=True))("POST", "/x", headers=own) == 200
    rules = Rules(local=True, origins=("https://app.example",))
    assert guarded(rules)("POST", "/x", headers={**own, "Origin": "https://APP.example"}) == 200
    assert guarded(rules)("POST", "/x", headers={**own, "Origin": "https://app.example.org"}) == 403


# --- rates


def test_a_rate_counts_what_computes_and_nothing_else() -> None:
    ask = guarded(limiter=Limiter(Rate(2, 3600)))
    for method, path in (
        *[("GET", "/metrics"), ("POST", "/api/v2/feedback"), ("POST", "/v2/repository/index")] * 3,
        *[("GET", "/v2/models/m"), ("GET", "/v1/models")] * 3,
    ):
        assert ask(method, path, text("sender")) == 200, path
    infer = "/v2/models/m/infer"
    assert [ask("POST", path, text("sender")) for path in (infer, "/v1/generate", infer)] == [200, 200, 429]
    assert ask("POST", infer, text("admin")) == 200, "another key"
    assert [ask("POST", infer, INTERNAL) for _ in range(5)] == [200] * 5, "our own processes"
    assert [ask("POST", "/api/v2/rollback", text("admin")) for _ in range(5)] == [200] * 5
    assert [guarded(Rules(local=True), limiter=Limiter(Rate(1, 3600)))("POST", infer) for _ in range(3)] == [200] * 3


# --- websockets, sockets, counting


def test_a_websocket_needs_view_and_its_own_origin() -> None:
    def opened(ask: Asked, **headers: str) -> bool:
        ask("", "/ws", headers=headers, kind="websocket")
        closed = [message["code"] for message in ask.messages] == [1008]
        assert closed != bool(ask.reached)
        return not closed

    assert not opened(guarded())
    assert not opened(guarded(), **{"X-API-Key": text("nobody")})
    assert opened(guarded(), **{"X-API-Key": text("viewer")})
    assert not opened(guarded(Rules(local=True)), Host="127.0.0.1:1", Origin="http://evil.example")
    assert not opened(guarded(Rules(local=True)), Host="evil.example:1")
    assert opened(guarded(Rules(local=True)), Host="127.0.0.1:1", Origin="http://127.0.0.1:1")
    # Not even where the path is one that anybody may read.
    ask = guarded()
    ask("", "/health", kind="websocket")
    assert ask.reached == []


def test_the_applications_start_needs_no_key() -> None:
    ask = guarded()
    asyncio.run(ask.guard({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
    assert [scope["type"] for scope in ask.reached] == ["lifespan"]


def test_refusals_are_counted_by_reason_and_said_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    failures: dict[str, int] = {}
    times = iter([0.0, 1.0, 2.0, 30.0])
    ask = guarded(failures=failures, monotonic=lambda: next(times))
    with caplog.at_level(logging.WARNING, "modelkeep.auth"):
        ask("GET", f"/metrics/{text('admin')}\n", text("nobody"))
        ask("GET", "/metrics")
        ask("POST", "/x", text("viewer"))
        ask("GET", "/metrics", text("gone"))
    assert failures == {"wrong": 1, "missing": 1, "role": 1, "revoked": 1}
    first, last = caplog.messages
    assert "refused (wrong): GET" in first and "10.0.0.7" in first and "\n" not in first
    assert "refused (revoked)" in last and "3 refused" in last
    for name in ("nobody", "admin", "gone"):
        assert text(name)[16:] not in caplog.text


def test_the_refusals_are_a_metric(tmp_path: Path) -> None:
    made = reconciler(tmp_path)
    app = create_app(made.serving, settings=made.settings, nudge=made.nudge, info=made.info)
    ask = Asked(Guard(app, ring(), Rules(local=False), failures=made.serving.auth_failures))
    ask("GET", "/metrics")
    assert ask("GET", "/metrics", text("viewer")) == 200
    assert 'modelkeep_auth_failures_total{reason="missing"} 1.0' in ask.body.decode()


def test_the_address_that_counts_is_the_sockets_own() -> None:
    for name, local in (
        (("127.0.0.1", 1), True), (("127.0.0.9", 1), True), (("::1", 1, 0, 0), True), (("0.0.0.0", 1), False),
        (("::", 1, 0, 0), False), (("10.0.0.1", 1), False), (("fe80::1%eth0", 1, 0, 2), False), ("/run/modelkeep.sock", True),
    ):  # fmt: skip
        assert is_local(name) is local, name
    # Handed over by systemd, say, while the settings still name 127.0.0.1.
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", 0))
        assert not child.rules_of(Settings(profile="cpu"), listener).open
