"""`modelkeep config show | set | validate`: the settings with their sources, and changes to modelkeep.toml."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from registry import layers
from registry.errors import SettingsError, StorageError, UsageError
from registry.layers import FILE_NAME, PREFIX
from registry.redaction import redact
from registry.sections import Entry
from registry.settings import Settings, build_settings, find_config, home_of, load_settings

if TYPE_CHECKING:
    from tomlkit import TOMLDocument

config_app = typer.Typer(help="The settings: show, change and check them.", no_args_is_help=True)
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]


@dataclass(frozen=True, slots=True)
class Change:
    """What `set_value` did. `before` and `after` are what the file said, None where it said nothing; secrets hidden."""

    key: str
    before: Any
    after: Any
    path: str
    overridden_by: str | None
    """The environment variable that wins over the file, where one is set."""


@config_app.command("show")
def show(as_json: Json = False) -> None:
    """Every setting, its value and where it comes from."""
    settings = load_settings()
    if as_json:
        document = {"config_file": _text(settings.config_file), "profile": settings.hardware.name}
        _print_json(document | {"settings": settings.describe()})
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"Settings ({settings.config_file or 'no ' + FILE_NAME})", box=box.SIMPLE_HEAD)
    for heading in ("Setting", "Value", "Source"):
        table.add_column(heading, overflow="fold")
    for row in settings.describe():
        value = row["value"]
        shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        source = row["source"].replace(f" ({settings.config_file})", "")
        cells = (row["key"], "" if value is None else shown, source)
        table.add_row(*(Text(cell) for cell in cells), style="dim" if source == "default" else "")
    Console().print(table)


@config_app.command("set")
def set_command(
    key: Annotated[str, typer.Argument(help="Dotted, as `config show` lists it: server.port, databases.app.url.")],
    value: Annotated[str, typer.Argument(help="Lists by commas or as JSON.")],
    as_json: Json = False,
) -> None:
    """Write one value to modelkeep.toml, after checking that the settings hold with it."""
    change = set_value(key, value)
    if as_json:
        _print_json(asdict(change))
        return
    before = "" if change.before is None else f" (was {change.before})"
    typer.echo(f"{change.key} = {change.after}{before} in {change.path}")
    if change.overridden_by is not None:
        typer.echo(f"{change.overridden_by} is set and wins over it", err=True)


@config_app.command("validate")
def validate(as_json: Json = False) -> None:
    """Check modelkeep.toml and the environment. Exit code 2 where something is wrong."""
    try:
        settings = load_settings()
    except SettingsError as error:
        if not as_json:
            raise
        _print_json({"valid": False, "problems": str(error).splitlines()})
        raise typer.Exit(SettingsError.exit_code) from error
    if as_json:
        document = {"valid": True, "problems": [], "config_file": _text(settings.config_file)}
        _print_json(document | {"profile": settings.hardware.name})
        return
    typer.echo(
        f"The settings are valid: {settings.config_file or 'no ' + FILE_NAME}, profile {settings.hardware.name}."
    )


def set_value(
    key: str,
    text: str,
    *,
    environ: Mapping[str, str] | None = None,
    config: Path | None = None,
    cwd: Path | None = None,
) -> Change:
    """Write one setting to modelkeep.toml: checked as a whole first, then replaced in one step; comments stay.

    The file is `config`, else the one that `load_settings` reads, else a new one: MODELKEEP_CONFIG, or in the home.
    Raises UsageError for an unknown key, SettingsError where the settings would not hold, StorageError where the file
    cannot be written; it is then as it was.
    """
    environ = os.environ if environ is None else environ
    cwd = Path.cwd() if cwd is None else cwd
    path = config if config is not None else target_file(environ, cwd)
    found = layers.resolve(Settings, key.split("."))
    if found is None:
        meant = layers.nearest(key, list(layers.keys(Settings)))
        raise UsageError(f"{key!r} is not a setting" + (f"; did you mean {meant!r}?" if meant else ""))
    place, annotation = found
    if len(place) == 1 and (section := layers.section_of(annotation)) is not None:
        raise UsageError(f"{key!r} is a section: set one of its keys ({', '.join(section.model_fields)})")
    try:
        value = _typed(annotation, text)
    except ValueError as error:
        raise SettingsError(f"{key} = {redact(text)!r} {error}") from error

    import tomlkit
    from tomlkit.exceptions import ParseError

    try:
        document = tomlkit.parse(path.read_text(encoding="utf-8")) if path.exists() else tomlkit.document()
    except ParseError as error:
        raise SettingsError(f"{path} is not valid TOML: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"{path} cannot be read: {error}") from error
    before = _put(document, place, value)
    written = tomlkit.dumps(document)
    build_settings(path, written, environ=environ, cwd=cwd)
    write_atomically(path, written)
    variable = PREFIX + "__".join(layers.slug(part).upper() for part in place)
    secret = place == ("api_key",) or ("password" in place[-1] and not place[-1].endswith("_file"))
    shown_before, shown_after = (None if v is None else "***" if secret else _hidden(v) for v in (before, value))
    return Change(key, shown_before, shown_after, str(path), variable if environ.get(variable, "").strip() else None)


def target_file(environ: Mapping[str, str], cwd: Path) -> Path:
    """The modelkeep.toml to write: the one in use, else the one that MODELKEEP_CONFIG names, else in the home."""
    named = environ.get("MODELKEEP_CONFIG", "").strip()
    if named and not (cwd / named).exists():
        return cwd / named
    return find_config(environ, cwd) or home_of(environ, cwd) / FILE_NAME


def write_atomically(path: Path, text: str) -> None:
    """Replace a file in one step: temporary name, fsync, rename. Raises StorageError; the old file then stands."""
    target = path.resolve()
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        mode = target.stat().st_mode & 0o777 if target.exists() else 0o600
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        temporary = Path(name)
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        temporary.replace(target)
        temporary = None
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise StorageError(f"{target} cannot be written: {error.strerror or error}; it is as it was before") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _typed(annotation: Any, text: str) -> Any:
    """The value as TOML would have it: 8000, true, ["a"]. What does not fit stays a text, for the settings to name."""
    from pydantic import TypeAdapter, ValidationError

    value = layers.decode(annotation, text)
    kind = layers.plain(annotation)
    if kind in (int, float, bool) or (isinstance(value, list) and layers.entry_of(annotation) is None):
        try:
            return TypeAdapter(kind).validate_python(value)
        except ValidationError:
            return value
    return value


def _put(document: TOMLDocument, place: tuple[str, ...], value: Any) -> Any:
    """Set the value at its place and return what was there. Named tables are found by name, or added."""
    import tomlkit

    table: Any = document
    entry: type[Entry] | None = None
    for part in place[:-1]:
        if entry is not None and entry.KEY is not None:
            key, wanted = entry.KEY, layers.slug(part)
            named = [item for item in table if layers.slug(str(item.get(key, ""))) == wanted]
            if not named:
                added = tomlkit.table()
                added[key] = part
                table.append(added)
                named = [table[-1]]
            table = named[0]
            continue
        entry = layers.entry_of(Settings.model_fields[part].annotation)
        if part not in table:
            table[part] = tomlkit.table() if entry is None else tomlkit.aot()
        table = table[part]
        if not isinstance(table, Mapping if entry is None else list):
            raise SettingsError(f"{part!r} in the file is no {'table' if entry is None else 'list of tables'}")
    before = table.get(place[-1])
    table[place[-1]] = value
    return before.unwrap() if hasattr(before, "unwrap") else before


def _hidden(value: Any) -> Any:
    if isinstance(value, list):
        return [_hidden(item) for item in value]
    return redact(value) if isinstance(value, str) else value


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _print_json(document: Mapping[str, Any]) -> None:
    json.dump(document, sys.stdout, ensure_ascii=False, indent=2)
    sys.stdout.write("\n")
