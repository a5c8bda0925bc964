"""The guide's example of aliases, as it stands there: its settings, its requests, its answers, with keys and a real server."""

from __future__ import annotations

import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from tests.e2e.harness import ROOT, box, images

SECTION = re.search(
    r"^## Paths of an application's own\n(.*?)^## ",
    (ROOT / "docs/GUIDE.md").read_text(),
    flags=re.MULTILINE | re.DOTALL,
)
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def sent(line: str, url: str, folder: Path, key: str | None) -> httpx.Response:
    """What a line of curl in the guide sends, at this server."""
    parts = shlex.split(line)
    assert parts[:2] == ["curl", "-s"] and parts[2].startswith("http://127.0.0.1:8000/"), line
    address = url + parts[2].removeprefix("http://127.0.0.1:8000")
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    options: dict[str, Any] = {}
    for option, value in zip(parts[3::2], parts[4::2], strict=True):
        if option == "-F":
            name, file = value.split("=@")
            options["files"] = {name: (file, (folder / file).read_bytes(), "image/png")}
        elif option == "-H":
            header, text = value.split(": ")
            headers[header] = text
        else:
            assert option in ("-d", "--data-binary"), line
            options["content"] = (folder / value.removeprefix("@")).read_bytes()
    return httpx.post(address, headers=headers, timeout=30, **options)


def test_the_guides_example_answers_as_the_guide_says(tmp_path: Path) -> None:
    assert SECTION is not None
    [settings] = re.findall(r"^```toml\n(.*?)^```", SECTION[1], flags=re.MULTILINE | re.DOTALL)
    lines = [line for line in SECTION[1].splitlines() if line.startswith("curl ")]
    picture, other = np.rint(images()[:2, 0] * 255).astype(np.uint8)
    written = io.BytesIO()
    Image.fromarray(picture).save(written, "PNG")
    (tmp_path / "digit.png").write_bytes(written.getvalue())
    samples = [{"pixels": (one / 255).reshape(1, 8, 8).tolist()} for one in (picture, other)]
    (tmp_path / "samples.json").write_text(json.dumps({"samples": samples}))
    config = tmp_path / "modelkeep.toml"
    config.write_text(settings)
    extra = {"MODELKEEP_CONFIG": str(config), "MODELKEEP_SECURITY__REQUIRE_KEYS": "true"}
    with box(tmp_path / "box", extra=extra) as found:
        found.first("1")
        found.serve()
        keys = {}
        for role in ("view", "infer"):
            done = found.modelkeep("keys", "create", role, "--role", role, "--json")
            assert done.returncode == 0, done.stderr
            keys[role] = json.loads(done.stdout)["key"]
        for key, status in ((None, 401), (keys["view"], 403)):
            assert [sent(line, found.url, tmp_path, key).status_code for line in lines] == [status] * 3
        by_form, by_body, by_json = (sent(line, found.url, tmp_path, keys["infer"]) for line in lines)
        assert [answer.status_code for answer in (by_form, by_body, by_json)] == [200] * 3, by_json.text
        assert by_form.headers["X-Model-Version"] == "1" and by_form.headers["X-Request-ID"]

        def scores(one: Any) -> Any:
            tensor = {"name": "image", "datatype": "FP32", "shape": [1, 1, 8, 8], "data": (one / 255).ravel().tolist()}
            headers = {"X-API-Key": keys["infer"]}
            answer = httpx.post(f"{found.url}/v2/models/digits/infer", json={"inputs": [tensor]}, headers=headers)
            return np.array(answer.json()["outputs"][0]["data"])

        first, second = scores(picture), scores(other)
        shares = np.exp(first - first.max()) / np.exp(first - first.max()).sum()
        best = int(first.argmax())
        digit = by_form.json()["digit"]
        assert by_body.json() == by_form.json() and set(by_form.json()) == {"digit"}
        assert (digit["index"], digit["label"]) == (best, NAMES[best])
        assert abs(digit["score"] - shares[best]) < 0.01 and round(digit["score"], 3) == digit["score"]
        assert by_json.json() == {"scores": [best, int(second.argmax())]}
        listed = httpx.get(found.url, headers={"X-API-Key": keys["view"]}).json()["aliases"]
        assert listed == [
            {"path": "/api/v2/analyze-image", "model": "digits"},
            {"path": "/api/v2/predict-quality", "model": "digits"},
        ]
        page = httpx.get(f"{found.url}/docs", headers={"X-API-Key": keys["view"]}).text
        assert "Which digit a picture shows" in page
