"""What a recovery leaves to a person, by the facts that the kinds of components return from their restore."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def notes(restored: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Of facts by component, sentences. Empty where nothing is left to do."""
    found = []
    for name, facts in restored.items():
        if facts.get("fill_in"):
            found.append(f"{name}: no backup holds secrets, set them again: {', '.join(facts['fill_in'])}")
        if facts.get("beside"):
            found.append(
                f"{name}: other files stood there, what came back lies beside them: {', '.join(facts['beside'])}"
            )
        if facts.get("kept"):
            found.append(f"{name}: what stood there is now {facts['kept']}")
        for of in ("accounts_failed", "roles_failed"):
            found += [f"{name}: {one}: {why}" for one, why in sorted(facts.get(of, {}).items())]
    return found
