"""The faults of a store, by case: what goes wrong, at which step, and what has to come of it. Run by test_storage_faults.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

SURVIVES, TOLD, KEPT, SPOOLED, NEVER_WRONG = "survives", "told", "kept", "spooled", "never wrong"
"""It is a complete backup; it is an error that says so; it is complete at the other place, or with the spool, and is brought to the
store later; reading gives the right bytes or an error, never others."""


@dataclass(frozen=True)
class Case:
    """`operation` and `name` say which requests fail, `times` how many of them; `word` has to be in the message."""

    fault: str
    step: str
    operation: str
    name: str
    times: int
    outcome: str
    word: str = ""
    checksums: bool = True
    component: str = "storage"
    reading: bool = False

    @property
    def id(self) -> str:
        often = "always" if self.times > 10 else f"{self.times} times"
        return f"{self.step}: {self.fault}, {often}: {self.outcome}"


ALWAYS = 1 << 20
P = "(.*/)?"
WRITING: dict[str, tuple[str, str]] = {
    "data key": ("PUT", P + "keys/.*"),
    "intent": ("PUT", P + "intents/.*"),
    "list of objects": ("LIST", P + "objects/"),
    "object": ("PUT", P + "objects/.*"),
    "look at an object": ("HEAD", P + "objects/.*"),
    "manifest": ("PUT", P + "[^/]*manifest.json"),
    "note": ("PUT", P + "states/.*"),
}
READING: dict[str, tuple[str, str]] = {
    "reading the data key": ("GET", P + "keys/.*"),
    "list of manifests": ("LIST", P + "2"),
    "reading the manifest": ("GET", P + "[^/]*manifest.json"),
    "reading an object": ("GET", P + "objects/.*"),
}

PASSING = ("500", "503", "502 without words", "429", "request timeout", "reset", "silence", "conflict")
"""Two of them in a row are nothing that a backup notices."""
PASSING_PUTS = ("bad digest", "drop", "truncate", "garble", "answer lost")
REFUSED = {
    "expired": "credentials have expired",
    "denied": "credentials do not allow it",
    "unknown key": "AWS_ACCESS_KEY_ID",
    "wrong secret": "AWS_SECRET_ACCESS_KEY",
    "skew": "differ by 36",
    "no bucket": "no such bucket",
    "quota": "quota",
    "redirect": "region",
}
LASTING = {
    "500": "500",
    "503": "SlowDown",
    "reset": "closed",
    "drop": "does not have it",
    "full": "XMinioStorageFull",
    "garble": "other bytes",
}
LASTING_LISTS = {"500": "500", "503": "SlowDown", "reset": "closed", "full": "XMinioStorageFull"}


def _writing() -> Iterator[Case]:
    for step, (operation, name) in WRITING.items():
        put = operation == "PUT"
        kinds = [*PASSING, *(PASSING_PUTS if put else ())]
        for fault in kinds:
            # A store that tells no checksum is one where only reading back finds out.
            yield Case(fault, step, operation, name, 2, SURVIVES, checksums=fault not in ("garble",))
        for fault, word in REFUSED.items():
            # A HEAD has no body: the store cannot say more than 403 or 404.
            if operation != "HEAD":
                yield Case(fault, step, operation, name, ALWAYS, TOLD, word)
        for fault, word in (LASTING if put else LASTING_LISTS).items():
            if operation == "HEAD":
                word = ""
            yield Case(fault, step, operation, name, ALWAYS, TOLD, word, checksums=fault != "garble")
    yield Case("truncate", "object", "PUT", P + "objects/.*", ALWAYS, TOLD, "were sent")
    yield Case("hidden", "look at an object", "HEAD", P + "objects/.*", 2, SURVIVES)
    yield Case("hidden", "look at an object", "HEAD", P + "objects/.*", ALWAYS, TOLD, "does not have it")
    yield Case("longer", "look at an object", "HEAD", P + "objects/.*", 2, SURVIVES)
    yield Case("longer", "look at an object", "HEAD", P + "objects/.*", ALWAYS, TOLD, "were sent")
    yield Case("not implemented", "manifest", "PUT", P + "[^/]*manifest.json", 1, SURVIVES)
    yield Case("other bytes", "reading the manifest back", "GET", P + "[^/]*manifest.json", 2, SURVIVES)
    yield Case("other bytes", "reading the manifest back", "GET", P + "[^/]*manifest.json", ALWAYS, TOLD, "other bytes")
    yield Case("hidden", "reading the manifest back", "GET", P + "[^/]*manifest.json", ALWAYS, TOLD, "does not have it")
    yield Case("truncate", "reading the manifest back", "GET", P + "[^/]*manifest.json", ALWAYS, TOLD, "other bytes")


def _reading() -> Iterator[Case]:
    for step, (operation, name) in READING.items():
        kinds = ["500", "503", "reset", "silence"]
        if operation == "GET":
            kinds += ["reset in the body", "longer"]
        for fault in kinds:
            yield Case(fault, step, operation, name, 2, SURVIVES, reading=True)
            yield Case(fault, step, operation, name, ALWAYS, NEVER_WRONG, reading=True)
        for fault, word in REFUSED.items():
            yield Case(fault, step, operation, name, ALWAYS, NEVER_WRONG, word, reading=True)
        if operation == "GET":
            for fault in ("other bytes", "truncate", "shorter", "huge", "hidden"):
                yield Case(fault, step, operation, name, ALWAYS, NEVER_WRONG, reading=True)
    for fault in ("other bytes", "truncate", "shorter"):
        yield Case(fault, "reading an object", "GET", P + "objects/.*", 1, SURVIVES, reading=True)


def _beside() -> Iterator[Case]:
    """The same with a second place, or a spool, that takes what the store does not."""
    for outcome in (KEPT, SPOOLED):
        for step in ("intent", "list of objects", "object", "manifest"):
            operation, name = WRITING[step]
            for fault in ("500", "reset", "expired", "no bucket", "full"):
                yield Case(fault, step, operation, name, ALWAYS, outcome)
        for fault in ("drop", "truncate"):
            yield Case(fault, "object", "PUT", P + "objects/.*", ALWAYS, outcome)


CASES: list[Case] = [*_writing(), *_reading(), *_beside()]
