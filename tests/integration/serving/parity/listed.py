"""Every difference between Triton and our server, with its reason. What is not here fails the parity test, and what is here and gone as well."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Difference:
    """Of these kinds of request (`*` stands for any text, also in the answers), in this aspect of the answer."""

    kinds: tuple[str, ...]
    aspect: str
    triton: str
    ours: str
    reason: str

    def each(self) -> list[Difference]:
        """One for each kind, so that none hides behind the others."""
        return [replace(self, kinds=(kind,)) for kind in self.kinds]

    def holds(self, kind: str, aspect: str, triton: str, ours: str) -> bool:
        pairs = ((self.aspect, aspect), (self.triton, triton), (self.ours, ours))
        return all(fits(*pair) for pair in pairs) and any(fits(pattern, kind) for pattern in self.kinds)


def fits(pattern: str, text: str) -> bool:
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), text, re.DOTALL) is not None


def _status(triton: int, ours: int, reason: str, *kinds: str) -> Difference:
    return Difference(kinds, "status", str(triton), str(ours), reason)


STATISTICS = ("statistics of *",)
CONFIGURATION = ("configuration of *",)

LISTED = (
    # Every answer
    Difference(("*",), "parameters", "false", "true", "our answers say how long they queued and were computed"),
    Difference(("*",), "error's Content-Type", "text/plain", "application/json", "it is JSON in both"),
    # Errors
    _status(
        500, 400, "the request is wrong, not the server: a 500 makes proxies send it again",
        "malformed: *", "an output without a name", "outputs are no list", "an output is no object",
        "binary_data is no boolean", "id is *", "parameters are no object", "a timeout that is no number",
        "binary_data_output is no boolean", "only the optional input", "classification: a negative number",
        "classification: a text", "classification: true", "deflate cut off", "the index, bad JSON",
    ),
    _status(
        200, 400, "Triton wraps the number around, or makes it infinite: another number than was sent",
        "malformed: INT32 of [2147483648]", "malformed: INT8 of [128]", "malformed: FP32 of [1e+39]",
        "malformed: data is [1e+300*",
    ),
    _status(
        200, 400, "the nesting of the data contradicts the shape: Triton does not look",
        "malformed: data is nested in another shape", 'malformed: BYTES of [["a"]]',
    ),
    _status(200, 400, "the end of the packed body is missing: Triton serves what came", "gzip cut off"),
    _status(200, 400, "a header that is no number: Triton reads as far as it can", "malformed: header length with a *"),
    _status(200, 400, "a byte order mark does not belong in JSON; a parser may refuse it (RFC 8259, 8.1)", "malformed: body is b'\\xef*"),
    _status(200, 400, "asked for twice is a slip", "an output asked for twice"),
    _status(
        400, 404, "what is not there is 404 on every path",
        "malformed: ready of *", "malformed: stats of *", "malformed: version 99999999999999999999",
    ),
    _status(404, 405, "the path is looked at before the model's name", "malformed: no such path: /v2/models//infer"),
    _status(501, 415, "the status that HTTP has for it", "a content encoding that nobody knows"),
    Difference(
        ("malformed: a name that is not UTF-8",), "error's body", "no JSON", "error", "Triton repeats the bytes in its error"
    ),
    # Inference
    _status(400, 200, "FP16 in JSON: Triton takes and gives it in binary only", "FP16, *", "malformed: FP16 of [1.0]"),
    _status(400, 200, "scores are scores; Triton has no FP16 here", "classification: of FP16"),
    _status(
        200, 422, "JSON has no NaN: Triton writes what JSON parsers refuse; binary answers carry it", "NaN and infinity as JSON"
    ),
    _status(200, 400, "strings of ONNX are text", "bytes that are no text, binary"),
    _status(500, 200, "null is none", "id is null"),
    Difference(("malformed: members twice",), "'id'", "1", "2", "JSON leaves it open which one counts; ours takes the last"),
    _status(400, 200, "the rows follow from the size", "a raw tensor, rows of a model with batches"),
    _status(400, 200, "a text of one element, whatever the shape is called", "a raw text"),
    _status(400, 200, "the one required input is meant", "a raw tensor where the other input is optional"),
    _status(400, 200, "no rows in, no rows out", "no rows for a model with batches"),
    _status(400, 200, "the limit is for requests put together; one long request is computed", "more rows than a batch has"),
    Difference(
        ("binary_data_output and an output that says nothing",), "outputs", "*false]]", "*true]]",
        "the binary extension: the request's parameter is the default of every output",
    ),
    Difference(
        ("binary_data_output and an output that says nothing", "no elements, binary", "an empty raw tensor"), "Content-Type",
        "application/json", "application/octet-stream", "the answer has a JSON header and a binary part, be it empty",
    ),
    Difference(
        ("classification: of a matrix without batches",), "outputs", "*[2], false]]", "*[2, 2], false]]",
        "Triton ranks the whole tensor, ours each row",
    ),
    # Transport
    _status(404, 200, "a slash behind a path is forgiven", "the server, with a slash", "malformed: a slash behind the path"),
    _status(404, 200, "a path is decoded (RFC 3986)", "malformed: a path in per cent"),
    _status(405, 200, "HEAD is allowed wherever GET is (RFC 9110, 9.3.2)", "HEAD of *"),
    _status(501, 200, "names of encodings know no capitals (RFC 9110, 8.4.1)", "gzip in capitals"),
    Difference(
        ("Accept-Encoding: *; a short answer",), "Content-Encoding", "*", "null", "packing a short answer costs more than it saves"
    ),
    Difference(
        ("Accept-Encoding: deflate, gzip; a long answer",), "Content-Encoding", "deflate", "gzip",
        "the client likes both alike",
    ),
    Difference(
        ("Accept-Encoding: any; a long answer",), "Content-Encoding", "null", "gzip", "`*` stands for any encoding (RFC 9110, 12.5.3)"
    ),
    # Documents
    Difference(("GET of health",), "Content-Type", "text/plain", "application/json", "there is a body"),
    Difference(("GET of health",), "body", "false", "true", "the protocol's `live` and `ready`"),
    Difference(("the server",), "name", "triton", "modelkeep", "its name"),
    Difference(("the server",), "version", "2.51.0", "*", "its version"),
    Difference(("the server",), "extensions", "*", "*", "ours has no sequences, shared memory, schedule policy, trace, logging"),
    Difference(("a model*",), "platform", "python", "onnxruntime_onnx", "Triton's wheel has no backend for ONNX"),
    Difference(CONFIGURATION, "platform", "", "onnxruntime_onnx", "Triton's wheel has no backend for ONNX"),
    Difference(
        ("a model with an optional input",), "inputs: lacks in Triton's", "optional", "", "a client can see what it may leave out"
    ),
    Difference(
        CONFIGURATION, "the document: lacks in ours",
        "backend, batch_input, batch_output, cc_model_filenames, default_model_filename, instance_group, metric_tags, "
        "model_warmup, optimization, parameters, runtime, version_policy", "", "settings of Triton's that ours does not have",
    ),
    Difference(
        CONFIGURATION, "input: lacks in ours", "allow_ragged_batch, format, is_non_linear_format_io, is_shape_tensor*",
        "", "settings of Triton's that ours does not have; `optional` where it is so",
    ),
    Difference(
        CONFIGURATION, "output: lacks in ours", "is_non_linear_format_io, is_shape_tensor, label_filename", "",
        "settings of Triton's that ours does not have",
    ),
    Difference(STATISTICS, "model_stats: lacks in ours", "batch_stats, memory_usage, response_stats", "", "`/metrics` has batches and memory"),
    Difference(
        STATISTICS, "model_stats.inference_stats: lacks in ours", "compute_input, compute_output", "",
        "ours does not measure copying apart from computing",
    ),
    Difference(STATISTICS, "model_stats.inference_stats.cache_hit: lacks in ours", "ns", "", "ours counts them, no more"),
    Difference(STATISTICS, "model_stats.inference_stats.cache_miss: lacks in ours", "ns", "", "ours counts them, no more"),
    Difference(STATISTICS, "model_stats.inference_stats: lacks in Triton's", "request", "", "all requests, however they ended"),
    Difference(("the repository's index", "the index of *"), "the document: lacks in Triton's", "reason", "", "the protocol has it"),
    # What ours leaves to the registry, or out
    _status(200, 404, "what is not there is 404: an unload with a slip in the name has not done what was meant", "unload of an unknown model"),
    _status(500, 404, "what is not there is 404 on every path", "load of an unknown model"),
    _status(200, 501, "no shared memory", "*sharedmemory: *"),
    _status(500, 501, "no shared memory", "systemsharedmemory: register"),
    _status(400, 501, "no shared memory", "cudasharedmemory: register"),
    _status(404, 400, "no shared memory", "an input in shared memory that is not there", "an output in shared memory that is not there"),
    _status(200, 501, "Triton's own, no part of the protocol", "Triton's own: *"),
    _status(200, 404, "versions are names in ours, `01` is another one than `1`", "malformed: version 01"),
)  # fmt: skip

ENDS_TRITON = {
    "classification: of BYTES": "a number divided by 0 (SIGFPE)",
    "classification: of no elements": "memory read that it does not have (SIGSEGV)",
    "malformed: shape is [1099511627776, 4]": "an error that nobody catches (SIGABRT)",
}
"""Requests by which Triton ends, and that ours answers. The test sends each to a Triton of its own."""

SAID = {
    "malformed: *": "malformed JSON, shapes, datatypes, data and sizes, some 80 kinds",
    "malformed: body is b'\\xef*": "a byte order mark before the JSON",
    "malformed: header length with a *": "a header length `+104` or `104.5`",
    "malformed: data is [1e+300*": "FP32 of `1e300`",
    "*": "every one",
}
"""Kinds in other words, for the table."""


def table() -> list[str]:
    """The list for people, in Markdown."""
    lines = ["| request | what differs | Triton 2.51 | ours | why |", "| --- | --- | --- | --- | --- |"]
    for one in LISTED:
        kinds = "; ".join(SAID.get(kind) or _cell(kind.removeprefix("malformed: ")) for kind in one.kinds)
        lines.append(f"| {kinds} | {_cell(one.aspect)} | {_cell(one.triton)} | {_cell(one.ours)} | {one.reason} |")
    for kind, why in ENDS_TRITON.items():
        lines.append(f"| {_cell(kind.removeprefix('malformed: '))} | status | none: it ends | an answer | {why} |")
    return [
        *lines,
        "| several in one go (pipelining) | answers | the first; the second when more bytes come | all, in order | |",
    ]


def _cell(text: str) -> str:
    words = {"": "—", "true": "yes", "false": "no", "null": "none"}
    text = words.get(text, text)
    return "`" + text.replace("|", "\\|") + "`" if any(mark in text for mark in "*_[<") else text
