"""The documents against the code: files, functions, links, commands, settings and endpoints that they name exist."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from registry import layers
from registry.policy import PromotionPolicy
from registry.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("blocks", "deployments", "flows", "modelkeep", "registry", "serving", "tasks")
DOCUMENTS = sorted(path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")))
NAMING_CODE = ("README.md", "docs/ARCHITECTURE.md")
WITH_COMMANDS = (
    "README.md",
    "CHANGELOG.md",
    "docs/API.md",
    "docs/ARCHITECTURE.md",
    "docs/GUIDE.md",
    "docs/PROMOTION.md",
    "docs/RUNBOOKS.md",
)

FILE = re.compile(r"[\w.-]+(?:/[\w.-]+)*\.(?:py|yaml|toml|md|npz)|(?:[\w-]+/)+")
DOTTED = re.compile(rf"(?:{'|'.join(ROOMS)})(?:\.\w+)+")
# Files of a user, which look like modules.
NOT_CODE = ("registry.db", "modelkeep.toml")


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def prose(text: str) -> str:
    """A document without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(text))


def fenced(text: str) -> Iterator[str]:
    """The lines of all fenced blocks that are commands (no language is named)."""
    for block in re.findall(r"^```\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
        yield from block.splitlines()


# --- files and functions


@cache
def names_in(path: Path) -> dict[str, Any]:
    """What a module defines at its top: {name: names of its members, where it is a class}."""
    return _names(ast.parse(path.read_text(encoding="utf-8")).body)


def _names(body: list[ast.stmt]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for node in body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = _names(node.body)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found[node.name] = {}
        elif isinstance(node, ast.Assign):
            found.update({target.id: {} for target in node.targets if isinstance(target, ast.Name)})
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = {}
    return found


def fault_of_name(name: str) -> str | None:
    """What is wrong with `room.module.function` or `room.module.Class.method`, in words."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        module = ROOT.joinpath(*parts[:length])
        file = module.with_suffix(".py") if module.with_suffix(".py").is_file() else module / "__init__.py"
        if file.is_file():
            break
    else:
        return f"{name}: no such module"
    here = names_in(file)
    for part in parts[length:]:
        if part not in here:
            return f"{name}: {file.relative_to(ROOT)} has no {part!r} there"
        here = here[part]
    return None


def fault_of_file(name: str) -> str | None:
    if not FILE.fullmatch(name) or (ROOT / name).exists():
        return None
    return f"{name}: no such file"


@pytest.mark.parametrize("document", NAMING_CODE)
def test_files_and_functions_that_a_document_names_exist(document: str) -> None:
    faults = []
    for name in quoted(text_of(document)):
        if DOTTED.fullmatch(name) and name not in NOT_CODE:
            faults.append(fault_of_name(name))
        elif name.endswith(".py") or name.split("/")[0] in (*ROOMS, "tests", "docs", "benchmarks", "scripts"):
            faults.append(fault_of_file(name))
    assert [fault for fault in faults if fault] == []


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("registry.audit.verify", None),
        ("serving.state.Serving.admit", None),
        ("registry.audit.verified", "has no 'verified'"),
        ("serving.state.Serving.admits", "has no 'admits'"),
        ("registry.nowhere.verify", "no 'nowhere'"),
    ],
)
def test_a_wrong_name_is_found(name: str, fault: str | None) -> None:
    found = fault_of_name(name)
    assert found == fault if fault is None else found is not None and fault in found


def test_a_file_that_is_not_there_is_found() -> None:
    assert fault_of_file("registry/nothing.py") == "registry/nothing.py: no such file"
    assert fault_of_file("registry/audit.py") is None


# --- links


def anchors(text: str) -> set[str]:
    """The anchors of a document's headings, as a forge makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def broken_links(document: str, text: str) -> list[str]:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / document).parent / path if path else ROOT / document
        if not file.exists():
            broken.append(f"{document}: {target}: no such file")
        elif anchor and anchor not in anchors(file.read_text(encoding="utf-8")):
            broken.append(f"{document}: {target}: no such heading")
    return broken


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    assert broken_links(document, text_of(document)) == []


def test_a_broken_link_is_found() -> None:
    text = "[a](NOTHING.md) [b](README.md#no-such-heading) [c](README.md#first-steps) [d](https://example.org/x)"
    assert broken_links("README.md", text) == [
        "README.md: NOTHING.md: no such file",
        "README.md: README.md#no-such-heading: no such heading",
    ]


# --- commands


@cache
def command_line() -> Any:
    import typer

    from modelkeep.cli import app

    return typer.main.get_command(app)


def fault_of_command(line: str) -> str | None:
    """What is wrong with `modelkeep COMMAND [SUBCOMMAND] --option …`; arguments are not looked at."""
    words = shlex.split(line, comments=True)[1:]
    here, path = command_line(), "modelkeep"
    while words and words[0] in getattr(here, "commands", {}):
        path = f"{path} {words[0]}"
        here, words = here.commands[words[0]], words[1:]
    left = [word for word in words if not word.startswith("-")]
    if here is command_line() or (hasattr(here, "commands") and left):
        return f"{line}: {path} has no command {left[:1] or ''}"
    known = {option for parameter in here.params for option in parameter.opts} | {"--help"}
    unknown = [word for word in words if word.startswith("--") and word not in known]
    return f"{line}: {path} has no option {', '.join(unknown)}" if unknown else None


def commands_in(text: str) -> list[str]:
    lines = [*fenced(text), *quoted(text)]
    lines = [part.strip() for line in lines for part in re.split(r"[|>&]|\$\(", line)]
    return [line for line in lines if re.match(r"modelkeep [a-z]", line)]


@pytest.mark.parametrize("document", WITH_COMMANDS)
def test_commands_that_a_document_prints_exist(document: str) -> None:
    assert [fault for line in commands_in(text_of(document)) if (fault := fault_of_command(line))] == []


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("modelkeep promote digits 2 --force --reason 'hot fix'", None),
        ("modelkeep audit verify", None),
        ("modelkeep promotions", None),
        ("modelkeep maintain", "has no command"),
        ("modelkeep audit prove", "has no command"),
        ("modelkeep rollback digits --hard", "has no option --hard"),
    ],
)
def test_a_command_that_does_not_exist_is_found(line: str, fault: str | None) -> None:
    found = fault_of_command(line)
    assert found == fault if fault is None else found is not None and fault in found


def test_make_targets_that_a_document_prints_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", text_of("Makefile"), flags=re.MULTILINE))
    printed = {
        found
        for document in DOCUMENTS
        for line in (*quoted(text_of(document)), *fenced(text_of(document)))
        for found in re.findall(r"^make ([a-z-]+)", line)
    }
    assert "demo" in printed
    assert printed - targets == set()


# --- settings, policy, endpoints


def test_settings_in_the_environment_that_a_document_prints_exist() -> None:
    known = layers.NOT_SETTINGS | {
        "MODELKEEP_" + key.replace(".", "__").replace("-", "_").upper() for key in layers.keys(Settings)
    }
    printed = {name for document in DOCUMENTS for name in re.findall(r"MODELKEEP_[A-Z0-9_]+", text_of(document))}
    assert "MODELKEEP_HOME" in printed
    # Of an entry of a list, MODELKEEP_DATABASES__APP__PASSWORD say, the name is the reader's own.
    unknown = {
        name
        for name in printed - known
        if layers.resolve(Settings, name.removeprefix(layers.PREFIX).lower().split("__"), "__") is None
    }
    assert {name for name in unknown if not name.startswith(layers.NOT_SETTINGS_PREFIXES)} == set()


def test_settings_in_the_guides_table_exist() -> None:
    known = set(layers.keys(Settings)) | {"database.*", "promotion.*"}
    table = re.search(r"^\| setting \|(?:.*\n\|)+.*", text_of("docs/GUIDE.md"), flags=re.MULTILINE)
    assert table is not None
    printed = {name for row in table[0].splitlines()[2:] for name in re.findall(r"`([^`]+)`", row.split("|")[1])}
    assert printed - known == set()


def test_the_guide_has_every_field_of_the_policy_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+?) \|", text_of("docs/GUIDE.md"), flags=re.MULTILINE))
    for name, field in PromotionPolicy.model_fields.items():
        default = field.default
        wanted = ", ".join(map(str, default)) or "none" if isinstance(default, list) else str(default).lower()
        assert rows.get(name) == wanted, name


def test_the_api_page_has_every_endpoint_of_the_server(tmp_path: Path) -> None:
    from registry.connect import open_database
    from registry.store import open_store
    from serving import child
    from serving.api import create_app
    from serving.follow.reconcile import Reconciler
    from serving.state import Serving
    from serving.traffic.capture import Capture

    settings = Settings(home=tmp_path)
    serving = Serving(environment="production", replica_id="replica", boot_id="boot")
    serving.capture = Capture(tmp_path / "captured", settings.capture)
    made = Reconciler(
        serving,
        settings,
        open_database(settings),
        open_store(settings.artifacts),
        state_folder=tmp_path,
        address="http://127.0.0.1:8000",
    )
    app = create_app(made.serving, settings=settings, nudge=made.nudge, info=made.info, routers=child.routers(made))
    served = {
        (method.upper(), path) for path, methods in app.pages.openapi()["paths"].items() for method in methods
    } | {("GET", "/docs")}
    written = set(re.findall(r"^\| (GET|POST|DELETE) \| `([^`]+)`", text_of("docs/API.md"), flags=re.MULTILINE))
    assert {row for row in written if not row[1].startswith("/v2")} == served
