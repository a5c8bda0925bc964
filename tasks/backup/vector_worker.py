"""The only place that imports chromadb for backups: a process of its own, so that its memory, its threads and its caches end with it.

It is told a job by the first line of its input and answers in lines of JSON: see `export` and `load`. Started by vectors.py.
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
from collections.abc import Iterator
from itertools import islice
from typing import Any
from urllib.parse import urlsplit

BATCH = 500
QUERIES = 5
NEIGHBOURS = 10


def main() -> None:
    job = json.loads(sys.stdin.buffer.readline())
    say({"load": load, "export": export}[job["action"]](job))


def say(document: dict[str, Any]) -> None:
    sys.stdout.buffer.write(json.dumps(document, sort_keys=True).encode() + b"\n")
    sys.stdout.buffer.flush()


def connect(where: str) -> Any:
    import chromadb
    from chromadb.config import Settings

    settings = Settings(anonymized_telemetry=False, chroma_query_request_timeout_seconds=120)
    if "://" not in where:
        return chromadb.PersistentClient(path=where, settings=settings)
    parts = urlsplit(where)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return chromadb.HttpClient(host=str(parts.hostname), port=port, ssl=parts.scheme == "https", settings=settings)


def export(job: dict[str, Any]) -> dict[str, Any]:
    """Each collection as a line {"collection"}, a line a record in the order of the ids, and a line {"end"}; then {"done"}.

    By ids: with offsets, a delete in the middle of the reading makes it miss records. `queries` names the records whose neighbours
    are looked up; where a collection has none there, some are chosen.
    """
    import chromadb

    client = connect(job["where"])
    there = sorted(str(one.name) for one in client.list_collections())
    asked = job.get("collections") or there
    absent = sorted(set(asked) - set(there))
    if absent:
        return {
            "error": f"there is no collection {', '.join(absent)}; there are {', '.join(there) or 'none'}",
            "kind": "missing",
        }
    for name in sorted(asked):
        collection = client.get_collection(name, embedding_function=None)
        ids = sorted(collection.get(include=[])["ids"])
        say(
            {
                "collection": {
                    "name": name,
                    "metadata": collection.metadata,
                    "configuration": collection.configuration_json,
                    "dimension": collection._model.dimension,
                    "count": len(ids),
                }
            }
        )
        if job.get("headers"):
            continue
        chosen = set(job.get("queries", {}).get(name, []) or ids[:: max(1, len(ids) // QUERIES)][:QUERIES])
        say({"end": _records(collection, ids, chosen)})
    return {"done": True, "chromadb": chromadb.__version__, "collections": len(asked)}


def _records(collection: Any, ids: list[str], chosen: set[str]) -> dict[str, Any]:
    import numpy as np

    digest, count, queries = hashlib.sha256(), 0, {}
    for batch in _batches(iter(ids)):
        found = collection.get(ids=batch, include=["embeddings", "documents", "metadatas", "uris"])
        place = {one: number for number, one in enumerate(found["ids"])}
        for one in batch:
            if one not in place:
                continue  # deleted since
            number = place[one]
            vector = np.asarray(found["embeddings"][number], dtype="<f4")
            say(
                {
                    "id": one,
                    "embedding": base64.b64encode(vector.tobytes()).decode(),
                    "document": found["documents"][number],
                    "metadata": found["metadatas"][number],
                    "uri": found["uris"][number],
                }
            )
            digest.update(one.encode() + b"\n")
            count += 1
            if one in chosen:
                queries[one] = vector.tolist()
    neighbours = []
    for one, vector in sorted(queries.items()):
        answer = collection.query(query_embeddings=[vector], n_results=min(NEIGHBOURS, count), include=["distances"])
        neighbours.append(
            {"of": one, "ids": answer["ids"][0], "distances": [float(value) for value in answer["distances"][0]]}
        )
    return {"count": count, "gone": len(ids) - count, "ids_sha256": digest.hexdigest(), "queries": neighbours}


def load(job: dict[str, Any]) -> dict[str, Any]:
    """Make collections of the lines that follow: {"collection"}, then a line a record, then perhaps the next {"collection"}.

    Each takes its name when it is whole. One that stands under that name is left alone, unless `force` says otherwise.
    """
    client = connect(job["where"])
    lines = iter(sys.stdin.buffer.readline, b"")
    header, made, lost = next(lines, b""), 0, []
    while header:
        one = json.loads(header)["collection"]
        following: list[bytes] = []
        answer = _make(client, one, _until_next(lines, following), bool(job["force"]))
        if "error" in answer:
            return answer
        if answer["lost"]:
            lost.append(f"{one['name']}: {answer['lost']}")
        made, header = made + 1, following[0] if following else b""
    return {"done": True, "collections": made, "lost": lost}


def _until_next(lines: Iterator[bytes], following: list[bytes]) -> Iterator[bytes]:
    for line in lines:
        if line.startswith(b'{"collection"'):
            following.append(line)
            return
        yield line


def _make(client: Any, header: dict[str, Any], lines: Iterator[bytes], force: bool) -> dict[str, Any]:
    import numpy as np

    name = str(header["name"])
    fresh = f"restoring-{hashlib.sha256(name.encode()).hexdigest()[:32]}"
    there = {str(one.name) for one in client.list_collections()}
    if name in there and not force and client.get_collection(name, embedding_function=None).count():
        return {"error": f"a collection {name} stands there", "kind": "conflict"}
    if fresh in there:
        client.delete_collection(fresh)  # what an interrupted call left
    configuration, lost = _configuration(header["configuration"])
    collection = client.create_collection(
        fresh, metadata=header["metadata"], configuration=configuration, embedding_function=None
    )
    count = 0
    for batch in _batches(lines, min(BATCH, client.get_max_batch_size())):
        records = [json.loads(line) for line in batch]
        collection.add(
            ids=[one["id"] for one in records],
            embeddings=[np.frombuffer(base64.b64decode(one["embedding"]), dtype="<f4") for one in records],
            documents=_present(records, "document"),
            metadatas=_present(records, "metadata"),
            uris=_present(records, "uri"),
        )
        count += len(records)
    if (found := collection.count()) != count:
        return {"error": f"{found} records of {count} arrived in {name}", "kind": "differs"}
    if name in there:
        client.delete_collection(name)
    collection.modify(name=name)
    return {"count": count, "lost": lost}


def _present(records: list[dict[str, Any]], field: str) -> list[Any] | None:
    values = [one[field] for one in records]
    return None if all(value is None for value in values) else values


def _configuration(given: dict[str, Any] | None) -> tuple[Any, str | None]:
    """How an index is made, and what of it cannot be had here (an embedding function whose key or library is missing)."""
    kept: dict[str, Any] = {name: given[name] for name in ("hnsw", "spann") if given and given.get(name)}
    function = (given or {}).get("embedding_function") or {}
    if function.get("type") != "known":
        return kept or None, None
    try:
        from chromadb.utils.embedding_functions import known_embedding_functions

        kept["embedding_function"] = known_embedding_functions[function["name"]].build_from_config(function["config"])
    except Exception as error:  # whatever a library of others raises: the vectors are there without it
        return kept or None, f"the embedding function {function.get('name')} is not set: {error}"
    return kept, None


def _batches(items: Iterator[Any], size: int = BATCH) -> Iterator[list[Any]]:
    while batch := list(islice(items, size)):
        yield batch


if __name__ == "__main__":
    main()
