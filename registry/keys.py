"""Keys to the server's API and to acts on record: made, revoked, checked. Where a server keeps what it knows of them is serving.access.keyring.

A key reads `mk_<id>_<secret>`; the id looks it up, the secret is 43 characters of 62 (256 bits). Kept is its SHA-256: a slow hash
protects what people choose, and nobody guesses 256 bits however fast he hashes.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import hmac
import os
import re
import secrets
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from sqlalchemy import ScalarSelect, select
from sqlalchemy.orm import Session

from registry import actor as actors
from registry import clock, names, rates
from registry.actor import Who
from registry.database import Database, Transaction
from registry.errors import ConflictError, NotFoundError, RefusedError, SettingsError, UsageError
from registry.schema import ApiKey, Counter
from registry.settings import Settings

Role = Literal["view", "infer", "operate"]
ROLES: tuple[Role, ...] = ("view", "infer", "operate")
"""Each may do what those before it may."""
INTERNAL = "internal"
"""Name and role of the key by which our own processes ask servers; never a person's."""
PREFIX = "mk_"
INTERNAL_PREFIX = "mki_"
COUNTER = "keys"
LONGEST_SECONDS = 10 * 366 * 86400.0
_NAME_LENGTH = 64
_ALPHABET = string.digits + string.ascii_letters
_FORM = re.compile(r"mk_([0-9a-f]{12})_([0-9A-Za-z]{43})")
_NOBODY = ("", "0" * 64)
"""What a key that nobody has is compared with, so that it costs the same."""

Failure = Literal["wrong", "revoked", "expired"]


@dataclass(frozen=True, slots=True)
class StoredKey:
    """What a key is checked against."""

    id: str
    name: str
    role: str
    hash: str
    expires_at: dt.datetime | None
    revoked: bool
    rate: str | None = None
    """Its own rate as registry.rates writes it; None: the server's setting."""


@dataclass(frozen=True)
class Principal:
    """Whose key it is, once it was found right."""

    key_id: str
    name: str
    role: Role
    rate: str | None = None
    """As in StoredKey."""

    @property
    def actor(self) -> str:
        return f"key:{self.name}"

    @cached_property
    def asking(self) -> Who:
        """As the author of a request."""
        return Who(self.actor, key_id=self.key_id, via="api")


@dataclass(frozen=True, slots=True)
class ApiKeyDescription:
    """A key without its secret."""

    id: str
    name: str
    role: str
    state: str
    """live | expired | revoked"""
    created_at: dt.datetime
    created_by: str
    expires_at: dt.datetime | None
    revoked_at: dt.datetime | None
    revoked_by: str | None
    rate: str | None = None
    """As in StoredKey."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "id": self.id,
            "name": self.name,
            "role": self.role,
            "rate": self.rate,
            "state": self.state,
            "created_at": clock.text(self.created_at),
            "created_by": self.created_by,
            "expires_at": None if self.expires_at is None else clock.text(self.expires_at),
            "revoked_at": None if self.revoked_at is None else clock.text(self.revoked_at),
            "revoked_by": self.revoked_by,
        }


def allows(role: Role, needed: Role) -> bool:
    return ROLES.index(role) >= ROLES.index(needed)


def digest(secret: str) -> str:
    """What is kept of a secret."""
    return hashlib.sha256(secret.encode()).hexdigest()


def check(text: str, known: Mapping[str, StoredKey], now: Callable[[], dt.datetime] = clock.now) -> Principal | Failure:
    """Whose key this is, or why it is none. An unknown one costs what a known one costs."""
    match = _FORM.fullmatch(text)
    identity, secret = match.groups() if match else _NOBODY
    stored = known.get(identity)
    same = hmac.compare_digest(digest(secret).encode(), (_NOBODY[1] if stored is None else stored.hash).encode())
    # Who has the secret may learn more than that it is wrong.
    if stored is None or not same or stored.role not in ROLES:
        return "wrong"
    if stored.revoked:
        return "revoked"
    if stored.expires_at is not None and now() >= stored.expires_at:
        return "expired"
    return Principal(stored.id, stored.name, stored.role, stored.rate)


def authenticate(session: Session, text: str) -> Principal | None:
    """Whose key this is, by the registry; None where it is wrong, revoked or expired."""
    found = _checked(session, text)
    return found if isinstance(found, Principal) else None


def of_command(database: Database, settings: Settings, *, needs: Role = "operate") -> Who:
    """Who gives this command: the key of setting `api_key`, else the system's user; `prefect-ui` in a run that a worker started.

    Raises RefusedError for a key that is wrong, revoked, expired, or whose role does not suffice.
    """
    text = presented(settings)
    if os.environ.get("PREFECT__FLOW_RUN_ID"):
        return Who(actors.current(), via="form")
    if text is None:
        return Who(actors.user(), via="command")
    principal = of_settings(database, text)
    if not allows(principal.role, needs):
        raise RefusedError(
            f"key {principal.name} has role {principal.role}, this needs {needs}: set MODELKEEP_API_KEY to a key of that role "
            f"(modelkeep keys create NAME --role {needs})"
        )
    return Who(principal.actor, key_id=principal.key_id, via="command")


def of_settings(database: Database, text: str) -> Principal:
    """Whose key a command was given. Raises RefusedError where it is none that the registry knows as good."""
    with database.read() as session:
        found = _checked(session, text)
    if isinstance(found, Principal):
        return found
    what = {"wrong": "is none that the registry knows", "revoked": "was revoked", "expired": "has expired"}[found]
    raise RefusedError(
        f"the key in api_key (MODELKEEP_API_KEY) {what}: set another (modelkeep keys create NAME --role operate), or unset it to act "
        "as this system's user"
    )


def presented(settings: Settings) -> str | None:
    """The key that the settings give to this process, by value or by file. Raises SettingsError for a file that cannot be read."""
    if settings.api_key is not None:
        return settings.api_key.get_secret_value().strip() or None
    if settings.api_key_file is None:
        return None
    try:
        text = settings.api_key_file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"api_key_file {settings.api_key_file} cannot be read: {error}") from error
    if not text:
        raise SettingsError(f"api_key_file {settings.api_key_file} is empty: it holds one key, mk_…")
    return text


def create(
    database: Database,
    *,
    name: str,
    role: str,
    who: Who,
    expires_in_seconds: float | None = None,
    rate: str | None = None,
) -> tuple[ApiKeyDescription, str]:
    """Make a key. Returns what it is, and its text, which nobody can read again. `rate`: None leaves it to the server's setting.

    Raises UsageError for a wrong name, role, time or rate, ConflictError where a live key has that name.
    """
    names.check_name(name, "name of a key")
    if len(name) > _NAME_LENGTH or name == INTERNAL:
        raise UsageError(f"{name!r} is not a name for a key: at most {_NAME_LENGTH} characters, and not {INTERNAL!r}")
    if role not in ROLES:
        raise UsageError(f"role {role!r}: there are {', '.join(ROLES)}")
    if expires_in_seconds is not None and not 0 < expires_in_seconds <= LONGEST_SECONDS:
        raise UsageError(f"a key may expire in up to 10 years, not in {expires_in_seconds:g} s")
    if rate is not None:
        rate = rates.written(rate)
    secret = "".join(secrets.choice(_ALPHABET) for _ in range(43))
    with database.write(actor=who.actor) as transaction:
        session = transaction.session
        _raise(session)
        now = clock.now()
        living = [row for row in _named(session, name) if _state(row, now) == "live"]
        if living:
            raise ConflictError(
                f"key {living[0].id} is called {name} and is live: take another name, or revoke that one first "
                f"(modelkeep keys revoke {living[0].id})"
            )
        expires_at = None if expires_in_seconds is None else now + dt.timedelta(seconds=expires_in_seconds)
        row = _add(transaction, name, role, digest(secret), expires_at, rate)
        return _describe(row, now), f"{PREFIX}{row.id}_{secret}"


def revoke(database: Database, identity: str, *, who: Who, reason: str = "") -> ApiKeyDescription:
    """End a key, by its id, by its name (the live one of that name, else the newest), or by its own text. One that is revoked already
    stays as it is. Raises NotFoundError.
    """
    if match := _FORM.fullmatch(identity):
        identity = match[1]
    with database.write(actor=who.actor) as transaction:
        session, now = transaction.session, clock.now()
        _raise(session)
        row = session.get(ApiKey, identity)
        if row is None:
            rows = _named(session, identity)
            if not rows:
                shown = f"{identity[:15]}…" if identity.startswith(PREFIX) else identity  # a whole key, by mistake
                raise NotFoundError(f"there is no key {shown!r}, neither by id nor by name: modelkeep keys list")
            row = max(rows, key=lambda candidate: (_state(candidate, now) == "live", candidate.created_at))
        if row.revoked_at is None:
            row.revoked_at, row.revoked_by = now, who.actor
            subject = {"name": row.name, "role": row.role}
            transaction.record("key.revoked", f"key:{row.id}", before=subject, reason=reason)
        return _describe(row, now)


def listed(session: Session) -> list[ApiKeyDescription]:
    """Every key, the oldest first."""
    now = clock.now()
    return [_describe(row, now) for row in session.scalars(select(ApiKey).order_by(ApiKey.created_at, ApiKey.id))]


# --- what servers follow


def stored(session: Session) -> list[StoredKey]:
    """All keys as a server checks by them."""
    return [_stored(row) for row in session.scalars(select(ApiKey).order_by(ApiKey.id))]


def counter_query() -> ScalarSelect[int]:
    """The number that rises with each change of a key, to be part of another query."""
    return select(Counter.value).where(Counter.name == COUNTER).scalar_subquery()


def counter(session: Session) -> int:
    return session.scalar(select(counter_query())) or 0


# --- our own processes ask servers


def ensure_internal(database: Database, *, actor: str) -> None:
    """Make sure that there is a live internal key: a secret that whoever reads the registry shares with the servers.

    It opens inference and reading, so that flows can ask servers which require keys; never what changes anything. Revoking it
    (`modelkeep keys revoke internal`) makes the servers agree on a new one.
    """
    with database.read() as session:
        if internal_secret(session) is not None:
            return
    try:
        with database.write(actor=actor) as transaction:
            _raise(transaction.session)
            if internal_secret(transaction.session) is None:
                _add(transaction, INTERNAL, INTERNAL, secrets.token_hex(32), None)
    except ConflictError:  # another server was faster
        return


def internal_secret(session: Session) -> str | None:
    """What the internal key is derived from; None where no server requires keys."""
    return session.scalar(
        select(ApiKey.hash).where(ApiKey.role == INTERNAL, ApiKey.revoked_at.is_(None)).order_by(ApiKey.id).limit(1)
    )


def internal_text(secret: str, address: str) -> str:
    """The internal key as it is shown to the server at one address: useless to whoever answers there in its stead, at any other."""
    return INTERNAL_PREFIX + hmac.new(bytes.fromhex(secret), address.encode(), hashlib.sha256).hexdigest()


def _checked(session: Session, text: str) -> Principal | Failure:
    match = _FORM.fullmatch(text)
    row = session.get(ApiKey, match[1] if match else _NOBODY[0])
    return check(text, {} if row is None else {row.id: _stored(row)}, clock.now)


def _raise(session: Session) -> None:
    """Tell the servers. Its row is locked first, so that one changes keys at a time."""
    row = session.get(Counter, COUNTER, with_for_update=True)
    if row is None:
        session.add(Counter(name=COUNTER, value=1))
    else:
        row.value += 1
    session.flush()


def _add(
    transaction: Transaction,
    name: str,
    role: str,
    hashed: str,
    expires_at: dt.datetime | None,
    rate: str | None = None,
) -> ApiKey:
    row = ApiKey(
        id=secrets.token_hex(6),
        name=name,
        role=role,
        hash=hashed,
        created_at=clock.now(),
        created_by=transaction.actor,
        expires_at=expires_at,
        rate=rate,
    )
    transaction.session.add(row)
    after = {"name": name, "role": role, "expires_at": None if expires_at is None else clock.text(expires_at)}
    if rate is not None:
        after["rate"] = rate
    transaction.record("key.created", f"key:{row.id}", after=after)
    return row


def _named(session: Session, name: str) -> list[ApiKey]:
    return list(session.scalars(select(ApiKey).where(ApiKey.name == name).order_by(ApiKey.created_at, ApiKey.id)))


def _stored(row: ApiKey) -> StoredKey:
    return StoredKey(row.id, row.name, row.role, row.hash, row.expires_at, row.revoked_at is not None, row.rate)


def _state(row: ApiKey, now: dt.datetime) -> str:
    if row.revoked_at is not None:
        return "revoked"
    return "live" if row.expires_at is None or now < row.expires_at else "expired"


def _describe(row: ApiKey, now: dt.datetime) -> ApiKeyDescription:
    return ApiKeyDescription(
        id=row.id,
        name=row.name,
        role=row.role,
        state=_state(row, now),
        created_at=row.created_at,
        created_by=row.created_by,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
        revoked_by=row.revoked_by,
        rate=row.rate,
    )
