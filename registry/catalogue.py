"""The catalogue of versions: lists in pages, one version in full, two side by side, tags, descriptions, the way to the archive."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session

from registry import clock, figures, history, modeltoml, names, states, stories, versions
from registry.database import Database
from registry.errors import NotFoundError, RefusedError, UsageError
from registry.schema import Approval, Model, Placement, Promotion, RollbackPoint, Route, Version

_TAG_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,62}")
_TAG_VALUE_LENGTH = 1000


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which versions to list. `tag` is (key, value), `environment` one where they stand."""

    model: str | None = None
    state: str | None = None
    tag: tuple[str, str] | None = None
    environment: str | None = None
    deleted: bool = True


def page(session: Session, wanted: Wanted, *, page: int = 1, limit: int = 50) -> dict[str, Any]:
    """One page of versions, the newest first, with where they stand. Two queries and a count, however many there are."""
    where = _where(wanted)
    total = session.scalar(select(func.count()).select_from(Version).where(*where)) or 0
    # Keys first: the wide rows of a page are read, those before it are not.
    order = [Version.ordinal.desc()] if wanted.model is not None else [Version.created_at.desc(), Version.model, Version.ordinal.desc()]  # fmt: skip
    keys = session.execute(
        select(Version.model, Version.version).where(*where).order_by(*order).offset((page - 1) * limit).limit(limit)
    ).all()
    rows = _rows(session, [(row.model, row.version) for row in keys])
    places = _places(session, list(rows))
    shown = [versions.describe(row, places.get(key, {})) for key, row in rows.items()]
    return {"versions": shown, "total": total, "page": page, "next": page + 1 if page * limit < total else None}


def _where(wanted: Wanted) -> list[ColumnElement[bool]]:
    where: list[ColumnElement[bool]] = []
    if wanted.model is not None:
        where.append(Version.model == wanted.model)
    if wanted.state is not None:
        if wanted.state not in states.VERSION_MOVES:
            raise UsageError(f"--state {wanted.state!r}: one of {', '.join(states.VERSION_MOVES)} is")
        where.append(Version.state == wanted.state)
    if wanted.tag is not None:
        key, value = wanted.tag
        where.append(Version.tags[_tag_key(key)].as_string() == value)
    if wanted.environment is not None:
        placed = select(Placement.version).where(
            Placement.model == Version.model,
            Placement.version == Version.version,
            Placement.environment == wanted.environment,
        )
        where.append(placed.exists())
    if not wanted.deleted:
        where.append(Version.deleted_at.is_(None))
    return where


def _rows(session: Session, keys: list[tuple[str, str]]) -> dict[tuple[str, str], Version]:
    """Rows by key, in the order of the keys; one query for each model among them."""
    found: dict[tuple[str, str], Version] = {}
    for model in dict.fromkeys(model for model, _ in keys):
        wanted = [version for name, version in keys if name == model]
        query = select(Version).where(Version.model == model, Version.version.in_(wanted))
        found.update({(row.model, row.version): row for row in session.scalars(query)})
    return {key: found[key] for key in keys if key in found}


def _places(session: Session, keys: list[tuple[str, str]]) -> dict[tuple[str, str], dict[str, str]]:
    places: dict[tuple[str, str], dict[str, str]] = {}
    for model in dict.fromkeys(model for model, _ in keys):
        wanted = [version for name, version in keys if name == model]
        query = select(Placement).where(Placement.model == model, Placement.version.in_(wanted))
        for row in session.scalars(query):
            places.setdefault((row.model, row.version), {})[row.environment] = row.status
    return places


def model_in_full(session: Session, model: str) -> dict[str, Any]:
    """A model: what it is, how many versions it has in which state, and what its routes are. Raises NotFoundError."""
    row = session.get(Model, model)
    if row is None:
        versions.get(session, model, "")  # says which models there are
        raise NotFoundError(f"there is no model {model!r}")
    counted = session.execute(
        select(Version.state, func.count()).where(Version.model == model).group_by(Version.state)
    ).all()
    routes = session.scalars(select(Route).where(Route.model == model).order_by(Route.environment))
    return {
        "model": model,
        "kind": row.kind,
        "description": row.description,
        "created_at": clock.text(row.created_at),
        "states": {state: int(number) for state, number in counted},
        "routes": {
            route.environment: {
                "stable": route.stable,
                "candidate": route.candidate,
                "weight": route.weight,
                "shadow": route.shadow,
                "generation": route.generation,
            }
            for route in routes
        },
    }


def version_in_full(session: Session, model: str, version: str) -> dict[str, Any]:
    """Everything on record of a version: what it is, its figures, where it stands, and how it came there."""
    row = versions.get(session, model, version)
    key = (model, version)
    return {
        **versions.describe(row, _places(session, [key]).get(key, {})),
        "files": row.files,
        "benchmark": row.benchmark,
        "measured": figures.measured(row),
        "live": figures.live(session, {model}).get(key),
        "lineage": lineage(session, row),
    }


def lineage(session: Session, row: Version) -> dict[str, Any]:
    """Who registered a version, every promotion of it with its run and its outcome, and when it was the stable one."""
    promotions = session.scalars(
        select(Promotion)
        .where(Promotion.model == row.model, Promotion.version == row.version)
        .order_by(Promotion.created_at.desc())
        .limit(_PROMOTIONS_SHOWN)
    ).all()
    given: dict[str, list[dict[str, Any]]] = {}
    if promotions:
        query = select(Approval).where(Approval.promotion.in_([one.id for one in promotions])).order_by(Approval.number)
        for answer in session.scalars(query):
            given.setdefault(answer.promotion, []).append(
                {"verdict": answer.verdict, "who": answer.actor, "via": answer.via, "counts": answer.counts, "at": clock.text(answer.at)}
            )  # fmt: skip
    return {
        "registered_at": clock.text(row.created_at),
        "registered_by": row.created_by,
        "promotions": [{**stories.describe(one), "approvals": given.get(one.id, [])} for one in promotions],
        "stable": history.times_stable(session, row.model, row.version),
    }


_PROMOTIONS_SHOWN = 50


def compare(session: Session, model: str, one: str, other: str) -> dict[str, Any]:
    """Two versions of a model side by side, and what differs. `change` is relative, for numbers: 0.1 is a tenth more."""
    sides = {version: _comparable(version_in_full(session, model, version)) for version in (one, other)}
    flat = {version: dict(_flat(side)) for version, side in sides.items()}
    differences = {}
    for name in dict.fromkeys([*flat[one], *flat[other]]):
        left, right = flat[one].get(name), flat[other].get(name)
        if left != right:
            differences[name] = {"a": left, "b": right, "change": _change(left, right)}
    return {"model": model, "a": {"version": one, **sides[one]}, "b": {"version": other, **sides[other]}, "differences": differences}  # fmt: skip


def _comparable(full: dict[str, Any]) -> dict[str, Any]:
    kept = ("state", "environments", "digest", "format", "size_bytes", "signature", "golden_digest", "tags", "facts", "created_at", "created_by")  # fmt: skip
    found = {name: full[name] for name in kept}
    found["signature"] = _tensors(full["signature"])
    found.update({name: full[name] for name in ("benchmark", "measured")})
    found["live"] = None if full["live"] is None else {k: v for k, v in full["live"].items() if k != "replicas"}
    return found


def _tensors(signature: dict[str, Any] | None) -> dict[str, Any] | None:
    """A signature by the names of its tensors, so that a difference is that of one tensor."""
    if signature is None:
        return None
    return {side: {str(spec["name"]): spec for spec in specs} for side, specs in signature.items()}


def _flat(value: Any, name: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        return [pair for key, inner in value.items() for pair in _flat(inner, f"{name}.{key}" if name else str(key))]
    return [] if isinstance(value, dict) or value is None else [(name, value)]


def _change(left: Any, right: Any) -> float | None:
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (left, right))
    return (right - left) / left if numbers and left else None


def tag(
    database: Database, model: str, version: str, changes: dict[str, str | None], *, actor: str | None = None
) -> dict[str, Any]:
    """Set tags, or take them away (None). Returns all tags of the version. Raises NotFoundError, UsageError."""
    for key, value in changes.items():
        _tag_key(key)
        if value is not None and len(value) > _TAG_VALUE_LENGTH:
            raise UsageError(f"the tag {key} has {len(value)} characters; at most {_TAG_VALUE_LENGTH} are kept")
    with database.write(actor=actor) as transaction:
        row = versions.get(transaction.session, model, version)
        before = dict(row.tags)
        after = {**before, **{key: value for key, value in changes.items() if value is not None}}
        for key in (key for key, value in changes.items() if value is None):
            after.pop(key, None)
        if after != before:
            row.tags = after
            transaction.record("version.tagged", f"version:{model}/{version}", before=before, after=after)
        return after


def describe_model(
    database: Database,
    model: str,
    *,
    description: str | None = None,
    kind: str | None = None,
    actor: str | None = None,
) -> dict[str, Any]:
    """Say what a model is for, and of which kind. What is None stays as it is. Raises NotFoundError, UsageError."""
    if kind is not None:
        modeltoml.check_kind(kind)
    names.check_model_name(model)
    with database.write(actor=actor) as transaction:
        row = transaction.session.get(Model, model)
        if row is None:
            versions.get(transaction.session, model, "")
            raise NotFoundError(f"there is no model {model!r}")
        before = {"description": row.description, "kind": row.kind}
        row.description = row.description if description is None else description
        row.kind = kind or row.kind
        after = {"description": row.description, "kind": row.kind}
        if after != before:
            transaction.record("model.described", f"model:{model}", before=before, after=after)
        return {"model": model, **after}


def archive(database: Database, model: str, version: str, *, reason: str, actor: str | None = None) -> dict[str, Any]:
    """Take a version out of use for good. Raises RefusedError while a route or a promotion under way names it.

    Returns what it was, and how many rollback points name it: nothing can go back to it from now on.
    """
    with database.write(actor=actor) as transaction:
        row = versions.get(transaction.session, model, version)
        in_use = used_by(transaction.session, row)
        if in_use:
            raise RefusedError(f"{model} {version} cannot be archived: {'; '.join(in_use)}")
        before = row.state
        states.move_version(transaction, row, "archived", reason=reason)
        return {
            "model": model,
            "version": version,
            "state": row.state,
            "before": before,
            "rollback_points": len(rollback_points(transaction.session, row)),
        }


def used_by(session: Session, row: Version) -> list[str]:
    """What uses a version now, in words: routes, and promotions under way."""
    routes = session.scalars(select(Route).where(Route.model == row.model)).all()
    found = [
        f"it is the {role} version in {route.environment}"
        for route in routes
        for role in ("stable", "candidate")
        if getattr(route, role) == row.version
    ]
    running = session.scalars(
        select(Promotion).where(Promotion.model == row.model, Promotion.state.in_(stories.ACTIVE))
    )
    found += [
        f"promotion {one.id} in {one.environment} is under way ({one.state})"
        for one in running
        if row.version in (one.version, one.from_version)
    ]
    return found


def rollback_points(session: Session, row: Version) -> list[str]:
    """The rollback points that name a version and are not gone."""
    query = select(RollbackPoint.id).where(
        RollbackPoint.model == row.model, RollbackPoint.version == row.version, RollbackPoint.gone_at.is_(None)
    )
    return list(session.scalars(query.order_by(RollbackPoint.created_at)))


def _tag_key(key: str) -> str:
    if not _TAG_KEY.fullmatch(key):
        raise UsageError(
            f"{key!r} is no key of a tag: it begins with a letter or a digit, and holds letters, digits, '.', '_', '/' and '-', at most 63"
        )
    return key
