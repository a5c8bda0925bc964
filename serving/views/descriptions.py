"""What the V2 protocol tells of the server, its models and versions: everything but inference. Triton's words where it has them."""

from __future__ import annotations

from functools import cache
from typing import Any

import orjson

from registry.errors import NotFoundError, UnavailableError
from serving.compute.engine import LoadedVersion
from serving.state import Serving
from serving.statuses import MethodError, NotYetError
from serving.views.metrics import software_version
from serving.wire.tensors import InputError, brief, json_type

EXTENSIONS = [
    "binary_tensor_data",
    "classification",
    "model_repository",
    "model_configuration",
    "parameters",
    "statistics",
]
_NO_SHARED_MEMORY = "shared memory is not supported; send tensors in the body, in binary"
_NO_TRACE = "trace settings are not supported; the answer's parameters say what time it took, /metrics what all took"
_NO_LOGGING = "log settings are not supported by the V2 protocol; the settings of this server have them"
_FOLLOWS = (
    "what is loaded follows the registry, so that every server serves the same and every change is on record: promote a "
    "version to load it (modelkeep promote), roll back to another (modelkeep rollback)"
)

_version = cache(software_version)


def describe(serving: Serving, method: str, path: str, body: bytes) -> Any:
    """The JSON answer. Raises NotFoundError, UnavailableError, InputError, MethodError, NotYetError."""
    match path.rstrip("/").split("/")[2:]:
        case []:
            _only(path, method, "GET")
            return {"name": "modelkeep", "version": _version(), "extensions": EXTENSIONS}
        case ["health", "live"]:
            _only(path, method, "GET")
            if not serving.live:
                raise UnavailableError("the server is not live")
            return {"live": True}
        case ["health", "ready"]:
            _only(path, method, "GET")
            if not serving.ready:
                raise UnavailableError("the server is not ready for traffic")
            return {"ready": True}
        case ["repository", "index"] | ["repository", _, "index"]:
            _only(path, method, "POST")
            return _index(serving, ready=_wants_ready(body))
        case ["repository", "models", model, "load" | "unload" as action] | [
            "repository", _, "models", model, "load" | "unload" as action
        ]:  # fmt: skip
            _only(path, method, "POST")
            if model not in serving.routes:
                serving.versions(model)  # says that it is not known
            # serving.follow.orders has taken those of a server that follows a registry.
            raise NotYetError(f"{action} by the V2 protocol is not supported: {_FOLLOWS}")
        case ["systemsharedmemory" | "cudasharedmemory", *_]:
            raise NotYetError(_NO_SHARED_MEMORY)
        case ["trace", "setting"] | ["models", _, "trace", "setting"]:
            raise NotYetError(_NO_TRACE)
        case ["logging"]:
            raise NotYetError(_NO_LOGGING)
        case ["models", "stats"]:
            _only(path, method, "GET")
            return {"model_stats": [_statistics(loaded) for _, loaded in sorted(serving.loaded.items())]}
        case ["models", model, "versions", version, *rest]:
            return _describe_model(serving, method, path, model, version, rest)
        case ["models", model, *rest]:
            return _describe_model(serving, method, path, model, None, rest)
    raise NotFoundError(f"{path} is not a path of the V2 protocol")


def _wants_ready(body: bytes) -> bool:
    """The body of a request for the index: {"ready": true} leaves out what is not ready."""
    if not body.strip():
        return False
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InputError(f"the request is not valid JSON: {error}") from error
    if document is None:
        return False
    if type(document) is not dict:
        raise InputError(f"the request must be a JSON object, it is {json_type(document)}")
    ready = document.get("ready", False)
    if type(ready) is not bool:
        raise InputError(f"'ready' must be true or false, it is {brief(ready)}")
    return ready


def _index(serving: Serving, *, ready: bool) -> list[dict[str, str]]:
    """Versions that are loaded, and those that a route names or that did not load, with why."""
    states = {key: ("READY", "") for key in serving.loaded}
    if not ready:
        for route in serving.routes.values():
            for version in (route.stable, route.candidate):
                if version is not None:
                    states.setdefault((route.model, version), _away(serving, route.model))
        for key, error in serving.load_errors.items():
            if key not in serving.loaded:
                states[key] = ("UNAVAILABLE", error)
    return [
        {"name": model, "version": version, "state": state, "reason": reason}
        for (model, version), (state, reason) in sorted(states.items())
    ]


def _away(serving: Serving, model: str) -> tuple[str, str]:
    """State and reason of a version that its route names and that is not in memory."""
    if (why := serving.unloaded.get(model)) is not None:
        return "UNAVAILABLE", f"unloaded on this server {why}"
    if (why := serving.sleeping.get(model)) is not None:
        return "UNAVAILABLE", f"not in memory ({why}): its next request loads it"
    return "LOADING", ""


def _describe_model(serving: Serving, method: str, path: str, model: str, version: str | None, rest: list[str]) -> Any:
    if rest == ["infer"]:
        _only(path, method, "POST")
    if rest not in ([], ["ready"], ["config"], ["stats"]):
        raise NotFoundError(f"{path} is not a path of the V2 protocol")
    _only(path, method, "GET")
    if rest == ["stats"]:
        return {"model_stats": [_statistics(loaded) for loaded in serving.versions(model, version)]}
    if rest == ["ready"]:
        _check_ready(serving, model, version)
        return {"name": model, "ready": True}
    loaded = serving.default_version(model) if version is None else serving.versions(model, version)[0]
    return _metadata(loaded, serving.versions(model)) if not rest else _config(loaded)


def _check_ready(serving: Serving, model: str, version: str | None) -> None:
    """Raises UnavailableError for what is known and not loaded, NotFoundError for what is not known."""
    route, residency = serving.routes.get(model), serving.residency
    named = route is not None and version in (None, route.stable, route.candidate)
    if residency is not None and named and residency.wakes(model):
        return  # its next request is answered, after a wait
    if version is not None:
        if (error := serving.load_errors.get((model, version))) and (model, version) not in serving.loaded:
            raise UnavailableError(f"model '{model}' version '{version}' did not load: {error}")
        _check_answers(serving.versions(model, version)[0])
        return
    if route is None:
        serving.versions(model)
    loaded = None if route is None else serving.loaded.get((model, route.stable or route.candidate or ""))
    if loaded is None:
        serving.versions(model)  # it may know better why
        raise UnavailableError(f"model '{model}' has no version in traffic that is loaded")
    _check_answers(loaded)


def _check_answers(loaded: LoadedVersion) -> None:
    if loaded.hung is not None:
        raise UnavailableError(f"model '{loaded.model}' version '{loaded.version}' hangs: {loaded.hung}")


def _metadata(loaded: LoadedVersion, versions: list[LoadedVersion]) -> dict[str, Any]:
    return {
        "name": loaded.model,
        "versions": [other.version for other in versions],
        "platform": loaded.runtime.platform,
        **loaded.runtime.signature.as_dict(),
    }


def _config(loaded: LoadedVersion) -> dict[str, Any]:
    """The model configuration as Triton words it: with batching, the dimensions leave the batch's out."""
    first = 1 if loaded.batching else 0

    def tensors(specs: Any) -> list[dict[str, Any]]:
        return [
            {
                "name": spec.name,
                "data_type": "TYPE_STRING" if spec.datatype == "BYTES" else f"TYPE_{spec.datatype}",
                "dims": list(spec.shape[first:]),
                **({"optional": True} if spec.optional else {}),
            }
            for spec in specs
        ]

    signature = loaded.runtime.signature
    return {
        "name": loaded.model,
        "platform": loaded.runtime.platform,
        "max_batch_size": loaded.max_batch if loaded.batching else 0,
        "input": tensors(signature.inputs),
        "output": tensors(signature.outputs),
    }


def _statistics(loaded: LoadedVersion) -> dict[str, Any]:
    """Cumulative figures in the words of Triton's statistics extension: counts and nanoseconds."""
    telemetry, total = loaded.telemetry, loaded.telemetry.total
    last, kept = telemetry.last_inference_unix_seconds, telemetry.cache

    def part(count: int, seconds: float) -> dict[str, int]:
        return {"count": count, "ns": int(seconds * 1e9)}

    return {
        "name": loaded.model,
        "version": loaded.version,
        "last_inference": 0 if last is None else int(last * 1000),
        "inference_count": telemetry.rows,
        "execution_count": telemetry.batches,
        "inference_stats": {
            "success": part(total.requests - total.errors, total.latency_seconds_total - total.error_seconds_total),
            "fail": part(total.errors, total.error_seconds_total),
            "request": part(total.requests, total.latency_seconds_total),
            "queue": part(total.requests, telemetry.queue_seconds),
            "compute_infer": part(total.requests, telemetry.model_seconds),
            "cache_hit": {"count": kept.l1 + kept.l2 + kept.shared},
            "cache_miss": {"count": kept.misses},
        },
    }


def _only(path: str, method: str, allowed: str) -> None:
    if method != allowed and not (method == "HEAD" and allowed == "GET"):
        raise MethodError(path, method, allowed)
