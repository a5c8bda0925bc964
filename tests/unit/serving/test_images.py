"""Uploaded pictures: what becomes of each kind, and that a hostile one costs nothing but its sender's answer."""

from __future__ import annotations

import asyncio
import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from registry.aliases import Alias, AliasImage
from registry.signature import Signature, TensorSpec
from serving.wire.forms import form_of
from serving.wire.images import arranged, tensor_of
from serving.wire.tensors import InputError
from tests.unit.serving.helpers import PythonRuntime, close, load, serve


def file_of(image: Image.Image, format: str = "PNG", **more: Any) -> bytes:
    target = io.BytesIO()
    image.save(target, format, **more)
    return target.getvalue()


def how(width: int = 2, height: int = 1, **more: Any) -> AliasImage:
    return AliasImage(width=width, height=height, **more)


def tensor(file: bytes | list[bytes], settings: AliasImage, datatype: str = "UINT8") -> Any:
    return asyncio.run(tensor_of([file] if isinstance(file, bytes) else file, settings, datatype))


RED_BLUE = Image.fromarray(np.array([[[255, 0, 0], [0, 0, 255]]], np.uint8))


@pytest.mark.parametrize("format", ["PNG", "BMP", "GIF", "WEBP"])
def test_what_browsers_write_is_read_exactly(format: str) -> None:
    file = file_of(RED_BLUE, format, **({"lossless": True} if format == "WEBP" else {}))
    assert tensor(file, how(layout="NHWC")).tolist() == [[[[255, 0, 0], [0, 0, 255]]]]


def test_a_jpeg_is_read_nearly() -> None:
    grey = Image.new("L", (16, 16), 100)
    found = tensor(file_of(grey, "JPEG", quality=95), how(16, 16, layout="NHW", channels=1))
    assert found.shape == (1, 16, 16) and np.abs(found.astype(int) - 100).max() <= 2


@pytest.mark.parametrize(
    ("layout", "shape"),
    [("NCHW", (1, 3, 1, 2)), ("NHWC", (1, 1, 2, 3)), ("CHW", (3, 1, 2)), ("HWC", (1, 2, 3))],
)
def test_the_layout_is_as_the_settings_say(layout: Any, shape: tuple[int, ...]) -> None:
    settings = how(layout=layout)
    found = tensor(file_of(RED_BLUE), settings)
    assert found.shape == shape and found.flags.c_contiguous
    reds = found[(0,) * (found.ndim - 3)] if layout.endswith("HW") else np.moveaxis(found, -1, -3)
    assert reds.reshape(3, 1, 2)[0].tolist() == [[255, 0]]
    wanted = tuple(1 if n == -1 else n for n in settings.shape)
    assert wanted == shape


def test_scale_mean_and_std_are_applied_by_channel() -> None:
    settings = how(layout="HWC", scale=1 / 255, mean=[0.5, 0.25, 0.0], std=[0.5, 1.0, 2.0])
    found = tensor(file_of(RED_BLUE), settings, "FP32")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [[[1, -0.25, 0], [-1, -0.25, 0.5]]], atol=1e-6)


@pytest.mark.parametrize(
    ("datatype", "dtype", "scale", "expected"),
    [
        ("FP16", "float16", 0.5, 127.5),
        ("FP64", "float64", 1 / 255, 1.0),
        ("BF16", "float32", 1.0, 255),
        ("INT8", "int8", 1.0, 127),
        ("UINT8", "uint8", -1.0, 0),
        ("UINT8", "uint8", 0.4999, 127),
        ("INT64", "int64", 2.0, 510),
        ("UINT16", "uint16", 1e9, 65535),
        ("FP16", "float16", 1e9, np.inf),
    ],
)
def test_values_fit_the_datatype(datatype: str, dtype: str, scale: float, expected: float) -> None:
    white = np.full((1, 1, 1, 1), 255, np.uint8)
    found = arranged(white, how(1, 1, channels=1, scale=scale), datatype)
    assert found.dtype == dtype and found.ravel().tolist() == [expected]


@pytest.mark.parametrize("datatype", ["INT32", "UINT32", "INT64", "UINT64"])
def test_the_largest_whole_numbers_do_not_turn_around(datatype: str) -> None:
    found = arranged(np.full((1, 1, 1, 1), 255, np.uint8), how(1, 1, channels=1, scale=1e30), datatype)
    limits = np.iinfo(datatype.lower())
    assert limits.max * 0.99 < int(found[0, 0, 0, 0]) <= limits.max


def test_a_picture_is_turned_as_its_exif_says() -> None:
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    file = file_of(RED_BLUE, exif=exif.tobytes())
    assert tensor(file, how(layout="HWC")).tolist() == [[[0, 0, 255], [255, 0, 0]]]
    exif[0x0112] = 6  # a quarter: one wide, two high
    found = tensor(file_of(RED_BLUE, exif=exif.tobytes()), how(1, 2, layout="HWC", resize="exact"))
    assert found.tolist() == [[[255, 0, 0]], [[0, 0, 255]]]


def test_palettes_transparency_and_sixteen_bits_become_plain() -> None:
    palette = RED_BLUE.convert("P", palette=Image.Palette.ADAPTIVE)
    assert tensor(file_of(palette), how(layout="HWC")).tolist() == [[[255, 0, 0], [0, 0, 255]]]
    clear = Image.fromarray(np.array([[[10, 20, 30, 0], [10, 20, 30, 255]]], np.uint8))
    assert tensor(file_of(clear), how(layout="HWC")).tolist() == [[[255, 255, 255], [10, 20, 30]]]
    assert tensor(file_of(clear), how(layout="HWC", background=0)).tolist() == [[[0, 0, 0], [10, 20, 30]]]
    assert tensor(file_of(clear), how(layout="HWC", channels=4))[0, 1].tolist() == [10, 20, 30, 255]
    dark = Image.fromarray(np.array([[0, 65535]], np.uint16))
    assert tensor(file_of(dark), how(channels=1, layout="HW")).tolist() == [[0, 255]]
    bits = Image.fromarray(np.array([[False, True]]))
    assert tensor(file_of(bits), how(channels=1, layout="HW")).tolist() == [[0, 255]]
    named = RED_BLUE.copy()
    found = tensor(file_of(named, transparency=(255, 0, 0)), how(layout="HWC"))
    assert found.tolist() == [[[255, 255, 255], [0, 0, 255]]]
    grey_and_clear = Image.fromarray(np.array([[[9, 255], [9, 0]]], np.uint8), "LA")
    assert tensor(file_of(grey_and_clear), how(channels=1, layout="HW")).tolist() == [[9, 255]]


def test_an_animation_is_its_first_picture() -> None:
    first, second = Image.new("L", (2, 1), 10), Image.new("L", (2, 1), 200)
    file = file_of(first, "GIF", save_all=True, append_images=[second])
    assert tensor(file, how(channels=1, layout="HW")).tolist() == [[10, 10]]


def test_another_size_is_stretched_bordered_cut_or_refused() -> None:
    wide = Image.new("L", (4, 2), 0)
    file = file_of(wide)
    square = {"channels": 1, "layout": "HW"}
    assert tensor(file, how(4, 4, resize="stretch", **square)).max() == 0
    bordered = tensor(file, how(4, 4, resize="fit", background=9, **square))
    assert bordered[:, 0].tolist() == [9, 0, 0, 9]
    assert tensor(file, how(2, 2, resize="crop", **square)).shape == (2, 2)
    with pytest.raises(InputError, match="has 4 x 2 pixels, this path takes 4 x 4"):
        tensor(file, how(4, 4, resize="exact", **square))


def test_several_pictures_are_a_batch_where_there_is_one() -> None:
    files = [file_of(Image.new("L", (1, 1), n)) for n in (1, 2, 3)]
    assert tensor(files, how(1, 1, channels=1, layout="NHW")).ravel().tolist() == [1, 2, 3]
    with pytest.raises(InputError, match="3 images were sent, this path takes one"):
        tensor(files, how(1, 1, channels=1, layout="HW"))
    with pytest.raises(InputError, match="the limit is 64"):
        tensor(files * 30, how(1, 1, channels=1, layout="NHW"))


def test_small_files_do_not_become_a_tensor_without_bounds() -> None:
    files = [file_of(Image.new("L", (1, 1)))] * 5
    with pytest.raises(InputError, match="5 images were sent, the limit at this size is 4") as refused:
        tensor(files, how(4096, 4096, channels=1, layout="NHW", resize="stretch"))
    assert refused.value.status == 413


GRADIENT = Image.linear_gradient("L").resize((640, 480))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "BMP"])
@pytest.mark.parametrize("resize", ["stretch", "fit", "crop"])
def test_a_large_picture_is_shrunk_in_two_steps_as_well_as_in_one(format: str, resize: Any) -> None:
    settings = how(8, 8, channels=1, layout="HW", resize=resize)
    from PIL import ImageOps

    once = {
        "stretch": lambda: GRADIENT.resize((8, 8), Image.Resampling.BILINEAR),
        "fit": lambda: ImageOps.pad(GRADIENT, (8, 8), Image.Resampling.BILINEAR, color=255),
        "crop": lambda: ImageOps.fit(GRADIENT, (8, 8), Image.Resampling.BILINEAR),
    }[resize]()
    found = tensor(file_of(GRADIENT, format, **({"quality": 95} if format == "JPEG" else {})), settings)
    assert np.abs(found.astype(int) - np.asarray(once).astype(int)).max() <= 3


def test_a_large_picture_that_lies_on_its_side_and_one_with_a_palette_are_shrunk_too() -> None:
    exif = Image.Exif()
    exif[0x0112] = 8  # to be turned by a quarter
    for format in ("PNG", "JPEG"):
        file = file_of(GRADIENT, format, exif=exif.tobytes())
        found = tensor(file, how(8, 8, channels=1, layout="HW"))
        assert found[:, 0].std() < 2 and found[0, 0] < found[0, -1] - 150, "the gradient runs from left to right"
    halves = Image.new("RGBA", (600, 600), (0, 0, 0, 0))
    halves.paste((200, 100, 0, 255), (0, 0, 300, 600))
    for picture in (halves, halves.quantize(4)):
        found = tensor(file_of(picture), how(6, 6, layout="HWC"))
        assert found[0, [0, 5]].tolist() == [[200, 100, 0], [255, 255, 255]]


def test_the_limit_is_for_all_pictures_of_a_request_and_webp_has_its_own() -> None:
    file = file_of(Image.new("L", (100, 100)))
    settings = how(1, 1, channels=1, layout="NHW", max_pixels=25_000)
    assert len(tensor([file] * 2, settings)) == 2
    with pytest.raises(InputError, match="with those before it more than the limit of 25000") as caught:
        tensor([file] * 3, settings)
    assert caught.value.status == 413
    with pytest.raises(InputError, match="the limit is 4000000"):
        tensor(file_of(Image.new("L", (2001, 2000)), "WEBP"), how(1, 1))


def test_where_the_size_must_be_exact_no_other_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda self: pytest.fail("it was opened"))
    with pytest.raises(InputError, match="has 40 x 20 pixels, this path takes 4 x 4"):
        tensor(file_of(Image.new("L", (40, 20))), how(4, 4, resize="exact"))


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG that says this size, whatever is in it."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(5001, 5000), (9400, 9600), (20_000, 20_000), (2**31 - 1, 2**31 - 1)])
def test_a_bomb_is_refused_before_it_is_opened(size: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="pixels") as caught:
        tensor(png(*size), how())
    assert caught.value.status == 413


@pytest.mark.parametrize(
    ("file", "said"),
    [
        (b"", "no bytes"),
        (b"hello", "none of 'JPEG', 'PNG'"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "none of"),
        (b"II*\x00" + bytes(100), "none of"),
        (png(100, 100), "cannot be read"),
        (file_of(Image.effect_noise((64, 64), 50))[:-400], "cannot be read"),
        (file_of(Image.effect_noise((64, 64), 50), "JPEG")[:700], "cannot be read"),
        (file_of(RED_BLUE, "JPEG") + b"\xff\xda" * 64, "more than 64 scans"),
        (png(0, 5), "cannot be read|none of"),
        (b"GIF89a" + bytes(20), "cannot be read|none of"),
        (b"BM" + bytes(60), "cannot be read|none of"),
        (b"RIFF\x00\x00\x00\x00WEBPVP8 " + bytes(30), "cannot be read|none of"),
    ],
)
def test_what_is_no_whole_picture_is_the_clients_error(file: bytes, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        tensor(file, how())
    assert caught.value.status == 400


SEEDS = [file_of(RED_BLUE.resize((9, 9)), format) for format in ("PNG", "JPEG", "GIF", "WEBP", "BMP")]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.sampled_from(SEEDS), changes=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=8))
@pytest.mark.filterwarnings("ignore")
def test_a_broken_picture_is_read_or_refused_and_nothing_else(seed: bytes, changes: list[tuple[int, int]]) -> None:
    broken = bytearray(seed)
    for at, value in changes:
        broken[at % len(broken)] = value
    try:
        assert tensor(bytes(broken), how(3, 3)).shape == (1, 3, 3, 3)
    except InputError as error:
        assert error.status in (400, 413)


# Over the server

PIXELS = Signature((TensorSpec("x", "FP32", (-1, 1, 1, 2)),), (TensorSpec("y", "FP32", (-1, 2)),))
GREY = {"width": 2, "height": 1, "channels": 1}


def flat(inputs: Any) -> dict[str, Any]:
    return {"y": inputs["x"].reshape(-1, 2)}


def form(*parts: tuple[str, bytes], boundary: str = "b0undary") -> tuple[bytes, dict[str, str]]:
    body = b"".join(f"--{boundary}\r\n{head}\r\n\r\n".encode() + content + b"\r\n" for head, content in parts)
    return body + f"--{boundary}--\r\n".encode(), {"Content-Type": f"multipart/form-data; boundary={boundary}"}


def part(name: str, file: str | None = None) -> str:
    return f'Content-Disposition: form-data; name="{name}"' + (f'; filename="{file}"' if file is not None else "")


def sent(body: bytes, headers: dict[str, str], signature: Signature = PIXELS, **more: Any) -> tuple[int, Any]:
    async def scenario() -> tuple[int, Any]:
        options = {"inputs": [{"input": "x", "image": GREY}], **more}
        one = Alias(path="/api/v2/analyze-image", model="m", **options)
        version = load(PythonRuntime(flat, signature))
        answer = await serve(version, aliases=[one]).ask("POST", one.path, body, headers)
        assert answer is not None
        close(version)
        return answer.status, answer.json()

    return asyncio.run(scenario())


PICTURE = file_of(Image.fromarray(np.array([[3, 250]], np.uint8)))


def test_a_picture_comes_as_the_body_or_in_a_form() -> None:
    assert sent(PICTURE, {"Content-Type": "image/png"}) == (200, {"y": [3, 250]})
    assert sent(PICTURE, {}) == (200, {"y": [3, 250]})
    assert sent(*form((part("image", "a.png"), PICTURE))) == (200, {"y": [3, 250]})
    assert sent(*form((part("note"), b"hello"), (part("photo", ""), PICTURE))) == (200, {"y": [3, 250]})
    several = form((part("photo", "a"), PICTURE), (part("photo", "b"), PICTURE))
    assert sent(*several) == (200, {"y": [[3, 250], [3, 250]]})


def test_a_form_may_have_values_beside_the_picture() -> None:
    signature = Signature((*PIXELS.inputs, TensorSpec("w", "FP32", (-1, 1))), PIXELS.outputs)
    inputs = [{"input": "x", "image": GREY, "field": "photo"}, {"input": "w", "field": "size.0"}]
    whole = form((part("photo", "a.png"), PICTURE), (part("size"), b"[2.5]"))
    assert sent(*whole, signature=signature, inputs=inputs)[0] == 200
    status, answer = sent(*form((part("photo", "a.png"), PICTURE)), signature=signature, inputs=inputs)
    assert status == 400 and "no 'size.0'" in answer["error"]
    status, answer = sent(*form((part("other", "a.png"), PICTURE)), signature=signature, inputs=inputs)
    assert status == 400 and "no file 'photo'; its files are 'other'" in answer["error"]


@pytest.mark.parametrize(
    ("text", "answer"),
    [(b"12345", "12345"), (b"null", "null"), ("é".encode(), "é"), (b'["a", "b"]', ["a", "b"]), (b"", "")],
)
def test_a_text_in_a_form_needs_no_quotation_marks(text: bytes, answer: Any) -> None:
    signature = Signature((TensorSpec("x", "BYTES", (-1,)),), (TensorSpec("y", "BYTES", (-1,)),))

    async def scenario() -> Any:
        one = Alias(path="/words", model="m")
        version = load(PythonRuntime(lambda given: {"y": given["x"]}, signature))
        body, headers = form((part("x"), text))
        got = await serve(version, aliases=[one]).ask("POST", one.path, body, headers)
        close(version)
        return got.json() if got is not None else None

    assert asyncio.run(scenario()) == {"y": answer}


@pytest.mark.parametrize(
    ("body", "headers", "said"),
    [
        (b"", {"Content-Type": "image/png"}, "no bytes"),
        (b'{"image": 3}', {"Content-Type": "application/json"}, "none of 'JPEG'"),
        (b"x", {"Content-Type": "multipart/form-data"}, "names no boundary"),
        (b"x", {"Content-Type": "multipart/form-data; boundary=b"}, "the form cannot be read"),
        (*form(), "the form cannot be read|has no image"),
        (*form((part("note"), b"hello")), "has no image"),
        (form((part("image", "a"), PICTURE))[0][:-20], form()[1], "cut off"),
        (*form(("Content-Type: image/png", PICTURE)), "has no name"),
        (*form(*[(part(f"p{n}"), b"1") for n in range(201)]), "more than 200 parts"),
        (*form((part("a"), b"1"), (part("a"), b"2")), "has 'a' twice"),
        (*form((part("a"), b"\xff\xfe")), "neither text nor a file"),
        (*form((part("a" * 5000), b"1")), "the form cannot be read"),
    ],
)
def test_a_form_that_is_wrong_says_what(body: bytes, headers: dict[str, str], said: str) -> None:
    import re

    status, answer = sent(body, headers)
    assert status == 400 and re.search(said, answer["error"]), answer


WHOLE, HEADERS = form((part("note"), b"hello"), (part("photo", "a.png"), PICTURE))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    changes=st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), max_size=5),
    cut=st.integers(0, len(WHOLE)) | st.just(len(WHOLE)),
    boundary=st.sampled_from(["b0undary", "b", '"b0undary"', "", '"']),
)
def test_a_broken_form_is_read_or_refused_and_nothing_else(
    changes: list[tuple[int, int]], cut: int, boundary: str
) -> None:
    broken = bytearray(WHOLE)
    for at, value in changes:
        broken[at] = value
    try:
        found = form_of(bytes(broken[:cut]), f"multipart/form-data; boundary={boundary}".encode())
    except InputError as error:
        assert error.status == 400
        return
    assert sum(len(content) for _, content in found.files) <= len(WHOLE)
