"""Who asks: the key of a request, checked before anything else looks at it."""

from __future__ import annotations

from fastapi import Request

from registry.actor import Who

ANONYMOUS = Who("anonymous", via="api")


def who_of(request: Request) -> Who:
    """The author of a request, as the guard in front of all pages found him."""
    found = request.scope.get("state", {}).get("who")
    return found if isinstance(found, Who) else ANONYMOUS
