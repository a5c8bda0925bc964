"""Where settings come from: one layer a source, its names checked, each value with its source."""

from __future__ import annotations

import difflib
import json
import tomllib
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel

from registry.errors import SettingsError
from registry.sections import Entry

PREFIX = "MODELKEEP_"
FILE_NAME = "modelkeep.toml"
NOT_SETTINGS = frozenset({"MODELKEEP_CONFIG"})
"""Variables that begin like a setting and are none."""
NOT_SETTINGS_PREFIXES = ("MODELKEEP_INTERNAL_", "MODELKEEP_TEST_")
"""What the supervisor tells its child, and what the tests are told."""


@dataclass(slots=True)
class Layer:
    """`values` is nested like the settings, named `[[tables]]` as mappings by slug; `sources` goes by dotted key."""

    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)


def slug(name: str) -> str:
    """How an entry is called where only letters and '_' are possible: in the name of an environment variable."""
    return name.lower().replace("-", "_")


def plain(annotation: Any) -> Any:
    """The annotation without `| None`."""
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
        if len(kinds) == 1:
            return kinds[0]
    return annotation


def section_of(annotation: Any) -> type[BaseModel] | None:
    kind = plain(annotation)
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def entry_of(annotation: Any) -> type[Entry] | None:
    kind = plain(annotation)
    if get_origin(kind) is not list:
        return None
    (item,) = get_args(kind)
    return item if isinstance(item, type) and issubclass(item, Entry) else None


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key that has a value of its own; an entry's name is written NAME."""
    for name, info in model.model_fields.items():
        section, entry = section_of(info.annotation), entry_of(info.annotation)
        if section is not None:
            yield from keys(section, f"{prefix}{name}.")
        elif entry is not None and entry.KEY is not None:
            yield from keys(entry, f"{prefix}{name}.NAME.")
        else:
            yield f"{prefix}{name}"


def nearest(key: str, known: Sequence[str]) -> str | None:
    """The known key that was probably meant: by its whole name, else by its last part."""
    if whole := difflib.get_close_matches(key, known, n=1, cutoff=0.75):
        return whole[0]
    last = key.rpartition(".")[2]
    by_last: dict[str, str] = {}
    for name in known:
        by_last.setdefault(name.rpartition(".")[2], name)
    found = difflib.get_close_matches(last, list(by_last), n=1, cutoff=0.75)
    return by_last[found[0]] if found else None


def resolve(model: type[BaseModel], parts: Sequence[str], joint: str = ".") -> tuple[tuple[str, ...], Any] | None:
    """The path of a key and the annotation of its value; None where there is no such key.

    `parts` of an entry are its list, its name (which may itself hold the joint) and one field.
    """
    info = model.model_fields.get(parts[0])
    if info is None:
        return None
    if len(parts) == 1:
        return (parts[0],), info.annotation
    section, entry = section_of(info.annotation), entry_of(info.annotation)
    if section is not None and (found := resolve(section, parts[1:], joint)) is not None:
        return (parts[0], *found[0]), found[1]
    if entry is not None and entry.KEY is not None and len(parts) >= 3 and parts[-1] in entry.model_fields:
        return (parts[0], joint.join(parts[1:-1]), parts[-1]), entry.model_fields[parts[-1]].annotation
    return None


def decode(annotation: Any, text: str) -> Any:
    """The value that a text stands for: JSON for tables and lists, commas too for lists of plain values, else the text.

    Raises ValueError where it is neither.
    """
    origin = get_origin(plain(annotation))
    if section_of(annotation) is None and origin not in (list, dict):
        return text
    stripped = text.strip()
    if stripped.startswith(("[", "{")):
        try:
            return json.loads(stripped)
        except json.JSONDecodeError as error:
            raise ValueError(f"is not valid JSON: {error}") from error
    if origin is list and entry_of(annotation) is None:
        return [part.strip() for part in stripped.split(",") if part.strip()]
    raise ValueError("must be JSON: a list begins with '[', a table with '{'")


def _settle(
    model: type[BaseModel],
    values: Mapping[str, Any],
    prefix: str,
    source: str,
    layer: Layer,
    problems: list[str],
    root: type[BaseModel],
) -> dict[str, Any]:
    settled: dict[str, Any] = {}
    for name, value in values.items():
        dotted, info = f"{prefix}{name}", model.model_fields.get(name)
        if info is None:
            candidate = difflib.get_close_matches(name, list(model.model_fields), n=1, cutoff=0.6)
            meant = f"{prefix}{candidate[0]}" if candidate else nearest(dotted, list(keys(root)))
            problems.append(f"{source}: {dotted!r} is not a setting" + (f"; did you mean {meant!r}?" if meant else ""))
            continue
        section, entry = section_of(info.annotation), entry_of(info.annotation)
        if section is not None and isinstance(value, Mapping):
            settled[name] = _settle(section, value, f"{dotted}.", source, layer, problems, root)
        elif entry is not None and entry.KEY is not None and isinstance(value, Mapping):  # [policies.digits]
            named = [{entry.KEY: key, **item} if isinstance(item, Mapping) else item for key, item in value.items()]
            settled[name] = _settle_entries(entry, named, dotted, source, layer, problems, root)
        elif entry is not None and isinstance(value, list) and all(isinstance(item, Mapping) for item in value):
            settled[name] = _settle_entries(entry, value, dotted, source, layer, problems, root)
        else:
            settled[name] = value
            layer.sources[dotted] = source
    return settled


def _settle_entries(
    entry: type[Entry],
    items: list[Any],
    dotted: str,
    source: str,
    layer: Layer,
    problems: list[str],
    root: type[BaseModel],
) -> dict[str, Any] | list[Any]:
    if entry.KEY is None:
        layer.sources[dotted] = source
        return [
            _settle(entry, item, f"{dotted}.{number}.", source, Layer(), problems, root)
            for number, item in enumerate(items)
        ]
    settled: dict[str, Any] = {}
    for number, item in enumerate(items, 1):
        name = item.get(entry.KEY) if isinstance(item, Mapping) else None
        if not isinstance(name, str) or not name:
            problems.append(f"{source}: number {number} of {dotted!r} has no {entry.KEY!r}")
        elif slug(name) in settled:
            problems.append(f"{source}: {dotted!r} has the {entry.KEY} {name!r} twice ('-' and '_' are one)")
        else:
            settled[slug(name)] = _settle(entry, item, f"{dotted}.{slug(name)}.", source, layer, problems, root)
    return settled


def file_layer(model: type[BaseModel], text: str, path: Path) -> Layer:
    """The layer of a modelkeep.toml.

    Raises SettingsError: wrong TOML with its line, unknown keys with the nearest right one.
    """
    source = f"{FILE_NAME} ({path})"
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{source} is not valid TOML: {error}") from error
    layer, problems = Layer(), list[str]()
    layer.values = _settle(model, values, "", source, layer, problems, model)
    if problems:
        raise SettingsError("\n".join(problems))
    return layer


def environment_layer(model: type[BaseModel], environ: Mapping[str, str]) -> Layer:
    """The layer of the MODELKEEP_* variables; empty ones count as not set. Raises SettingsError for an unknown one."""
    layer, problems = Layer(), list[str]()
    # short names first: MODELKEEP_SERVER__PORT refines MODELKEEP_SERVER='{…}', whatever the order they come in
    ours = (name for name in environ if name.startswith(PREFIX))
    for variable in sorted(ours, key=lambda name: (name.count("__"), name)):
        if variable in NOT_SETTINGS or variable.startswith(NOT_SETTINGS_PREFIXES):
            continue
        source, text = f"environment {variable}", environ[variable]
        found = resolve(model, variable[len(PREFIX) :].lower().split("__"), "__")
        if found is None:
            known = [key.upper().replace(".", "__") for key in keys(model)]
            known += [name.removeprefix(PREFIX) for name in NOT_SETTINGS]
            meant = difflib.get_close_matches(variable.removeprefix(PREFIX), known, n=1, cutoff=0.7)
            problems.append(f"{source} is not a setting" + (f"; did you mean {PREFIX}{meant[0]}?" if meant else ""))
            continue
        if not text.strip():
            continue
        path, annotation = found
        try:
            value = decode(annotation, text)
        except ValueError as error:
            problems.append(f"{source} {error}")
            continue
        if len(path) == 1 and not isinstance(value, str):
            settled = _settle(model, {path[0]: value}, "", source, layer, problems, model)
            merge(layer.values, settled)
        else:
            nested: Any = value
            for name in reversed(path):
                nested = {name: nested}
            merge(layer.values, nested)
            layer.sources[".".join(path)] = source
    if problems:
        raise SettingsError("\n".join(problems))
    return layer


def of_an_entry(model: type[BaseModel], variable: str) -> bool:
    """Whether a variable is about one entry of a list of tables: MODELKEEP_DATABASES__APP__PASSWORD."""
    name, _, rest = variable.removeprefix(PREFIX).lower().partition("__")
    field = model.model_fields.get(name) if variable.startswith(PREFIX) else None
    return bool(rest) and field is not None and entry_of(field.annotation) is not None


def merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Put `values` over what is there, table by table. No table of `values` is shared afterwards."""
    for name, value in values.items():
        if not isinstance(value, Mapping):
            into[name] = value
            continue
        if not isinstance(into.get(name), dict):
            into[name] = {}
        merge(into[name], value)


def profile_layer(values: Mapping[str, Mapping[str, Any]], source: str) -> Layer:
    sources = {f"{section}.{name}": source for section, table in values.items() for name in table}
    return Layer({section: dict(table) for section, table in values.items()}, sources)
