"""Models, versions and their history, as a person reads them."""

from __future__ import annotations

from typing import Any

from modelkeep.output import say, size, table


def versions(found: dict[str, Any]) -> None:
    table(
        ["model", "version", "state", "where", "format", "size", "digest", "tags", "by"],
        [
            [
                row["model"],
                row["version"],
                "deleted" if row["deleted_at"] else row["state"],
                ", ".join(f"{where}: {how}" for where, how in sorted(row["environments"].items())),
                row["format"],
                size(row["size_bytes"]),
                row["digest"][:12],
                ", ".join(f"{key}={value}" for key, value in sorted(row["tags"].items())),
                row["created_by"],
            ]
            for row in found["versions"]
        ],
        empty="no such versions; register one: modelkeep register FILE --name NAME",
    )
    if found["next"] is not None:
        say(f"{found['total']} versions; the next page: --page {found['next']}")


def model(found: dict[str, Any]) -> None:
    kind = f" ({found['kind']})" if found["kind"] else ""
    say(f"{found['model']}{kind}" + (f": {found['description']}" if found["description"] else ""))
    for environment, route in found["routes"].items():
        say(f"in {environment}: {share(route)}")
    say(", ".join(f"{number} {state}" for state, number in sorted(found["states"].items())))
    say("")


def share(row: dict[str, Any]) -> str:
    """A route in words: which version answers, and what beside it."""
    if row["stable"] is None and row["candidate"] is None:
        return "nothing"
    stable = row["stable"] or "none"
    if row["candidate"] is None:
        return f"version {stable}"
    if not row["weight"]:
        return f"version {stable}" + (
            f", copies to {row['candidate']}" if row["shadow"] else f", {row['candidate']} at 0 %"
        )
    return f"version {stable} with {1 - row['weight']:.4g}, {row['candidate']} with {row['weight']:.4g} of the requests"


def version(found: dict[str, Any]) -> None:
    say(f"{found['model']} {found['version']}: {'deleted' if found['deleted_at'] else found['state']}")
    for environment, status in sorted(found["environments"].items()):
        say(f"  in {environment}: {status}")
    say(f"  {found['format']}, {size(found['size_bytes'])}, SHA-256 {found['digest']}")
    for side in ("inputs", "outputs"):
        for spec in (found["signature"] or {}).get(side, ()):
            say(f"  {side[:-1]} {spec['name']} {spec['datatype']} {spec['shape']}")
    if found["tags"]:
        say("  tags " + ", ".join(f"{key}={value}" for key, value in sorted(found["tags"].items())))
    for name, value in sorted(found["facts"].items()):
        if name == "labels":
            value = {output: said if isinstance(said, str) else f"{len(said)} labels" for output, said in value.items()}
        say(f"  {name}: {value}")
    _figures("last validation", found["measured"])
    _figures("last benchmark", found["benchmark"])
    live = found["live"]
    _figures(
        "live traffic", None if live is None else {name: value for name, value in live.items() if name != "replicas"}
    )
    lineage = found["lineage"]
    say(f"registered {lineage['registered_at'][:19]} by {lineage['registered_by']}")
    for row in lineage["promotions"]:
        run = f", run {row['flow_run_id']}" if row["flow_run_id"] else ""
        why = f": {row['reason']}" if row["reason"] else ""
        say(
            f"promotion {row['id']} to {row['environment']} by {row['actor']}{run}, {row['created_at'][:19]}: {row['state']}{why}"
        )
    for row in lineage["stable"]:
        until = f"until {row['until'][:19]} ({row['ended_by']})" if row["until"] else "until now"
        say(f"stable in {row['environment']} from {row['since'][:19]} {until}, by {row['who']}")


def _figures(title: str, found: dict[str, Any] | None) -> None:
    if found is None:
        say(f"  {title}: not measured")
        return
    say(f"  {title}: " + ", ".join(f"{name} {_number(value)}" for name, value in found.items()))


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def changes(found: dict[str, Any]) -> None:
    table(
        ["when", "where", "generation", "kind", "what answers", "by", "promotion", "why"],
        [
            [
                row["since"][:19],
                row["environment"],
                row["generation"],
                row["kind"],
                share(row),
                row["who"],
                row["promotion"],
                row["reason"],
            ]
            for row in found["changes"]
        ],
        empty=f"{found['model']} was never served",
    )
    if found["next"] is not None:
        say(f"{found['total']} changes; the next page: --page {found['next']}")


def moment(found: dict[str, Any]) -> None:
    say(f"environment {found['environment']} at {found['at']}")
    table(
        ["model", "what answered", "since", "by", "kind", "promotion", "why", "servers"],
        [
            [
                row["model"],
                " or ".join(dict.fromkeys(share(one) for one in (row, *row["or"], *row["before"]))),
                row["since"][:19],
                row["who"],
                row["kind"],
                row["promotion"],
                row["reason"],
                _servers(row),
            ]
            for row in found["models"]
        ],
        empty="no model was served",
    )
    for note in found["notes"]:
        say(note)


def _servers(row: dict[str, Any]) -> str:
    silent = sum(one["silent"] for one in row["replicas"])
    counted = [one for one in row["replicas"] if not one["silent"]]
    followed = sum(one["reached"] for one in counted)
    if not row["replicas"]:
        return "none on record"
    return f"{followed} of {len(counted)} had followed" + (f", {silent} silent" if silent else "")


def comparison(found: dict[str, Any]) -> None:
    left, right = found["a"]["version"], found["b"]["version"]
    table(
        ["", left, right, "change"],
        [
            [name, _shown(pair["a"]), _shown(pair["b"]), None if pair["change"] is None else f"{pair['change']:+.1%}"]
            for name, pair in found["differences"].items()
        ],
        empty=f"{found['model']} {left} and {right} do not differ in anything on record",
    )


def _shown(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def look(found: dict[str, Any]) -> None:
    for row in found["registered"]:
        say(f"{row['path']}: registered as {row['model']} {row['version']} ({row['digest'][:12]}…)")
    for row in found["known"]:
        say(f"{row['path']}: known as {row['model']} {row['version']} ({row['state']})")
    for row in found["wrong"]:
        say(f"{row['path']}: not registered: {row['reason']}")
    for row in found["waiting"]:
        say(f"{row['path']}: left alone for now: {row['reason']}")
