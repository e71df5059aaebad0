"""Where images are, what makes two the same, and what is refused before and while decoding."""

import os
import pickle
import random
import warnings
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tests.pictures import COLORS, encode, flipped_png, huge_png, noise, picture, plain
from vembed.errors import DataError
from vembed.images import (
    FORMATS,
    ImageBytes,
    ImageError,
    ImageFolder,
    ImageInMemory,
    ImageInTar,
    ImageLimits,
    as_image_source,
    load_image,
    probe_image,
)
from vembed.modes import Item


def pixels(image):
    return np.asarray(image).tolist()


def refusal(call, *args, **kwargs):
    with pytest.raises(ImageError) as caught:
        call(*args, **kwargs)
    assert isinstance(caught.value, DataError)
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)
    assert len(str(again)) < 500
    return str(again)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images" / "sub").mkdir(parents=True)
    return ImageFolder(str(tmp_path / "images"))


@pytest.fixture
def store(folder):
    """Writes a file into the folder and gives its source."""

    def write(name, data):
        with open(os.path.join(folder.root, name), "wb") as file:
            file.write(data)
        return folder.find(name, where="rows.jsonl:3: query")

    return write


# --- decoding


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_gives_rgb(store, format):
    save = {"lossless": True} if format == "WEBP" else {}
    source = store("a.picture", picture("blue", format=format, **save))
    image = load_image(source)
    assert (image.mode, image.size) == ("RGB", (24, 16))
    np.testing.assert_allclose(np.asarray(image), np.full((16, 24, 3), COLORS["blue"]), atol=2)
    assert probe_image(source).format == format
    assert probe_image(source, decode=True) == probe_image(source)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (plain((10, 20, 30, 0), mode="RGBA"), (255, 255, 255)),
        (plain((10, 20, 30, 255), mode="RGBA"), (10, 20, 30)),
        (plain((0, 0, 0, 51), mode="RGBA"), (204, 204, 204)),
        (plain((7, 0), mode="LA"), (255, 255, 255)),
        (plain(7, mode="L"), (7, 7, 7)),
        (plain(1, mode="1"), (255, 255, 255)),
        (plain(0x8040, mode="I;16"), (128, 128, 128)),
        (plain(0xFFFF, mode="I;16"), (255, 255, 255)),
    ],
    ids=["clear", "opaque", "half", "grey-alpha", "grey", "bits", "grey16", "white16"],
)
def test_modes_and_transparency(image, expected):
    loaded = load_image(ImageBytes(encode(image)))
    assert loaded.mode == "RGB"
    assert loaded.getpixel((3, 3)) == expected
    assert load_image(ImageInMemory(image)).getpixel((3, 3)) == expected


def test_palette_with_a_transparent_colour():
    image = plain("red").convert("P", palette=Image.Palette.ADAPTIVE)
    data = encode(image, "GIF", transparency=image.getpixel((0, 0)))
    assert load_image(ImageBytes(data)).getpixel((0, 0)) == (255, 255, 255)


def test_printers_colours():
    data = encode(plain((0, 255, 255, 0), mode="CMYK"), "JPEG", quality=95)
    np.testing.assert_allclose(load_image(ImageBytes(data)).getpixel((0, 0)), (255, 0, 0), atol=6)


def test_32_bit_samples_have_no_known_range():
    image = ImageInMemory(plain(0.5, mode="F"))
    assert "8 or 16 bits per channel" in refusal(load_image, image)


def test_the_first_frame_of_an_animation():
    frames = [plain(color) for color in ("green", "red", "blue")]
    for format, more in (("GIF", {}), ("WEBP", {"lossless": True})):
        data = encode(frames[0], format, save_all=True, append_images=frames[1:], **more)
        assert load_image(ImageBytes(data)).getpixel((0, 0)) == COLORS["green"]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    upright = Image.new("RGB", (3, 2))
    upright.putdata([(40 * i, 0, 0) for i in range(6)])
    stored = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(stored, exif=exif)
    assert pixels(load_image(ImageBytes(data))) == pixels(upright)
    with_exif = Image.open(as_image_source(data).open())
    assert pixels(load_image(as_image_source(with_exif))) == pixels(upright)


@pytest.mark.parametrize("value", [0, 9, 77, "x", -1])
def test_orientations_that_there_are_not(value):
    exif = Image.Exif()
    exif[0x0112] = value
    try:
        data = encode(plain(), "JPEG", exif=exif)
    except Exception:
        pytest.skip("Pillow does not write it")
    assert load_image(ImageBytes(data)).size == (24, 16)


def test_broken_exif_is_no_exif():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(plain(), "JPEG", exif=exif)
    at = data.index(b"Exif\0\0")
    chooser = random.Random(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(300):
            broken = bytearray(data)
            for _ in range(3):
                broken[at + 6 + chooser.randrange(26)] = chooser.randrange(256)
            assert load_image(ImageBytes(bytes(broken))).size in {(24, 16), (16, 24)}


# --- damage


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_truncated_files(store, format, decode, share):
    data = encode(noise(), format)
    source = store("cut.jpg", data[: int(share * len(data))])
    message = refusal(probe_image, source, decode=decode)
    assert message.startswith("rows.jsonl:3: query: an image must be whole. Received: 'cut.jpg'")
    assert refusal(load_image, source).startswith("rows.jsonl:3: query: an image must be whole")


def test_what_stands_behind_the_picture_is_nobody_s_business():
    for format in ("JPEG", "PNG", "WEBP"):
        data = encode(noise(), format) + b"a film of this phone" * 500
        assert probe_image(ImageBytes(data), decode=True).width == 96


def test_a_flipped_bit_shows_when_it_is_decoded():
    source = ImageBytes(flipped_png())
    assert probe_image(source).width == 96
    assert "an image must be whole" in refusal(probe_image, source, decode=True)
    assert "an image must be whole" in refusal(load_image, source)


def test_any_mutation_is_decoded_or_refused():
    chooser = random.Random(1)
    outcomes = {"decoded": 0, "refused": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for format in FORMATS:
            data = encode(noise((24, 16)), format)
            for _ in range(120):
                broken = bytearray(data)
                for _ in range(chooser.randint(1, 4)):
                    at = int(len(broken) * chooser.random() ** 3)  # mostly in the header
                    broken[at : at + chooser.choice([0, 1, 1, 4])] = chooser.randbytes(
                        chooser.choice([0, 1, 1, 4])
                    )
                for call in (probe_image, load_image):
                    try:
                        call(ImageBytes(bytes(broken)))
                        outcomes["decoded"] += 1
                    except ImageError:
                        outcomes["refused"] += 1
    assert min(outcomes.values()) > 100


# --- limits


def test_the_pixel_limit_comes_before_decoding(store, monkeypatch):
    source = store("bomb.png", huge_png(10_000, 5_001))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: pytest.fail("decoded"))
    for call in (load_image, probe_image):
        message = refusal(call, source)
        assert "not have more than 50,000,000 pixels. Received: 'bomb.png', of 10,000" in message
        assert "set max_image_pixels higher" in message
    # Beyond what Pillow itself opens.
    assert "more than 50,000,000 pixels" in refusal(
        load_image, store("b.png", huge_png(100_000, 99_000))
    )


def test_the_limit_is_the_source_s_or_the_caller_s():
    data = picture(size=(10, 10))
    tight = ImageLimits(max_pixels=99)
    assert load_image(ImageBytes(data), limits=ImageLimits(max_pixels=100)).size == (10, 10)
    refusal(load_image, ImageBytes(data), limits=tight)
    refusal(load_image, ImageBytes(data, limits=tight))
    refusal(load_image, ImageInMemory(plain(size=(10, 10)), limits=tight))
    assert load_image(ImageBytes(data, limits=tight), limits=ImageLimits()).size == (10, 10)


def test_bytes_have_a_limit_too(store):
    source = replace(store("a.bmp", picture(format="BMP")), limits=ImageLimits(max_bytes=1000))
    assert "must not be larger than 0 MB" in refusal(load_image, source)


# --- what is no image


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "an image must not be empty. Received: 'x.jpg', of 0 bytes"),
        (b"<!DOCTYPE html>", "must be one of JPEG, PNG, WEBP, GIF, BMP. Received: 'x.jpg', which"),
        (b"\x89PNG\r\n\x1a\n", "an image must be"),
        (b"\xff\xd8\xff\xe0", "an image must be"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n", "must be one of JPEG"),
        (encode(plain(), "TIFF"), "must be one of JPEG"),
        (encode(plain(), "ICO"), "must be one of JPEG"),
        (encode(plain(), "PPM"), "must be one of JPEG"),
    ],
    ids=["empty", "html", "png-magic", "jpeg-magic", "eps", "tiff", "ico", "ppm"],
)
def test_files_that_are_no_images(store, data, expected):
    for call in (load_image, probe_image):
        message = refusal(call, store("x.jpg", data))
        assert message.startswith("rows.jsonl:3: query: ")
        assert expected in message


# --- paths


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("../secret.png", "must not contain '..'"),
        ("sub/../../secret.png", "must not contain '..'"),
        ("sub/../a.png", "must not contain '..'"),
        ("/etc/passwd", "must lie under the image folder"),
        ("http://169.254.169.254/latest/meta-data", "must be a file, not a URL"),
        ("HTTPS://example.com/a.png", "not a URL"),
        ("file:///etc/passwd", "not a URL"),
        ("file:/etc/passwd", "not a URL"),
        ("data:image/png;base64,AAAA", "not a URL"),
        ("s3://bucket/a.png", "not a URL"),
        ("hf://datasets/a/b.png", "not a URL"),
        ("a\0.png", "must not contain NUL"),
    ],
)
def test_paths_that_are_refused(folder, path, expected):
    message = refusal(folder.find, path, where="f:1: query")
    assert message.startswith("f:1: query: an image ")
    assert expected in message


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("missing.png", "there is no such image file"),
        ("sub", "must be a regular file. Received: 'sub', which is a folder"),
        (".", "which is a folder"),
        ("pipe", "which is a device or a pipe"),
        ("out.png", "must lie under the image folder. Received: 'out.png', which leads to"),
        ("outside/secret.png", "must lie under the image folder"),
        ("loop", "an image"),
        ("dangling", "there is no such image file"),
        ("x" * 5000, "an image file must be readable"),
        ("\udcff.png", "there is no such image file"),
    ],
)
def test_files_that_cannot_be_read(folder, tmp_path, path, expected):
    (tmp_path / "secret.png").write_bytes(picture())
    os.mkfifo(tmp_path / "images" / "pipe")
    (tmp_path / "images" / "out.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "images" / "outside").symlink_to(tmp_path)
    (tmp_path / "images" / "loop").symlink_to(tmp_path / "images" / "loop")
    (tmp_path / "images" / "dangling").symlink_to(tmp_path / "images" / "nothing")
    message = refusal(load_image, folder.find(path, where="f:1: query"))
    assert message.startswith("f:1: query: ")
    assert expected in message


def test_a_file_without_permission(store, folder):
    source = store("a.png", picture())
    os.chmod(os.path.join(folder.root, "a.png"), 0)
    if os.access(os.path.join(folder.root, "a.png"), os.R_OK):
        pytest.skip("root may read everything")
    assert "must be readable" in refusal(load_image, source)


def test_paths_that_mean_the_same_file(folder, tmp_path):
    (tmp_path / "images" / "sub" / "a.png").write_bytes(picture())
    (tmp_path / "link").symlink_to(tmp_path / "images")
    (tmp_path / "images" / "inside.png").symlink_to(tmp_path / "images" / "sub" / "a.png")
    first = folder.find("sub/a.png")
    for path in ("./sub//a.png", f"{folder.root}/sub/a.png"):
        assert folder.find(path) == first
    linked = ImageFolder(str(tmp_path / "link"))
    assert linked.find(f"{folder.root}/sub/a.png").path == "sub/a.png"
    for source in (first, folder.find("inside.png"), linked.find("sub/a.png")):
        assert load_image(source).size == (24, 16)


# --- what makes two the same


def test_sources_travel_and_compare_by_place(store, folder):
    source = store("a.png", picture())
    again = folder.find("a.png", where="elsewhere:1: positive")
    assert source == again == pickle.loads(pickle.dumps(source))
    assert len({source, again, replace(again, limits=ImageLimits(max_pixels=5))}) == 1
    assert source.identity == "a.png"
    assert replace(source, prefix="set/").identity == "set/a.png"
    assert replace(source, root="/other") != source


def test_bytes_and_open_images_compare_by_content():
    data = picture()
    first, second = ImageBytes(data, name="a.png"), ImageBytes(bytes(bytearray(data)))
    assert first == second
    assert len({first, second, ImageBytes(picture("blue"))}) == 2
    assert first.identity == second.identity != ImageBytes(picture("blue")).identity
    assert load_image(pickle.loads(pickle.dumps(first))).size == (24, 16)
    one, other = ImageInMemory(plain()), ImageInMemory(plain())
    assert one == other
    assert len({one, other, ImageInMemory(plain("blue"))}) == 2
    assert pickle.loads(pickle.dumps(one)) == one
    assert ImageInMemory(plain(size=(8, 2))) != ImageInMemory(plain(size=(2, 8)))
    assert pixels(load_image(ImageBytes(one.read()))) == pixels(plain())


def test_tar_members(tmp_path):
    data = picture("green")
    shard = tmp_path / "s.tar"
    shard.write_bytes(b"\0" * 512 + data + b"\0" * 100)
    source = ImageInTar(str(shard), "a/7.png", 512, len(data))
    assert source.identity == "s.tar/a/7.png"
    assert load_image(pickle.loads(pickle.dumps(source))).getpixel((0, 0)) == COLORS["green"]
    assert "a shard must be whole. Received: '7.png' in 's.tar'" in refusal(
        load_image, ImageInTar(str(shard), "7.png", 512, 10_000)
    )
    assert "must not be empty" in refusal(load_image, replace(source, size=0))
    shard.unlink()
    assert "a shard must be readable" in refusal(load_image, source)


def test_content_ids_follow_text_and_image(folder):
    a, b = folder.find("a.png"), folder.find("b.png")
    items = [Item("x"), Item("x", a), Item("x", b), Item(None, a), Item("y", a), Item("a.png")]
    assert len({item.content_id for item in items}) == len(items)
    assert Item("x", a).content_id == Item("x", folder.find("./a.png")).content_id
    # Known values: what another machine and another day must find.
    assert Item("red apple").content_id == 2592169231570364055
    assert Item(None, a).content_id == 307803002648650872
    assert str(Item("x", a)) == "x 'a.png'"


def test_images_of_a_python_program(tmp_path):
    (tmp_path / "a.png").write_bytes(picture("blue"))
    with Image.open(tmp_path / "a.png") as opened:
        for image in (tmp_path / "a.png", str(tmp_path / "a.png"), picture("blue"), opened):
            assert load_image(as_image_source(image)).getpixel((0, 0)) == COLORS["blue"]
    source = as_image_source(picture())
    assert as_image_source(source) is source
    assert "not a URL" in refusal(as_image_source, "https://example.com/a.png")
    with pytest.raises(TypeError, match="Received: int"):
        as_image_source(3)


def test_importing_it_does_not_pay_for_pillow():
    import subprocess
    import sys

    code = "import sys, vembed.images, vembed.modes; print({'PIL', 'torch'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


# --- mistakes of people, told by what they are


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (encode(plain("red"), "TIFF"), "which is a TIFF."),
        (b"MM\0*" + bytes(20), "which is a TIFF."),
        (b"%PDF-1.7 and so on", "which is a PDF."),
        (b"\0\0\0\x18ftypheic" + bytes(20), "which is of the kind 'HEIC'."),
        (b"plain words of a text", "which begins with b'plain words of a'."),
    ],
)
def test_foreign_files_are_called_by_their_name(data, said):
    with pytest.raises(ImageError, match="must be one of JPEG") as caught:
        load_image(ImageBytes(data))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("path", "advice"),
    [
        ("photos/a.JPG", "Did you mean 'photos/a.jpg'?"),
        ("photos/a.jpeg", "Did you mean 'photos/a.jpg'?"),
        ("photos/b.png", "Did you mean 'photos/b.PNG'?"),
        ("photos\\a.jpg", "Write '/' between folders: 'photos/a.jpg'."),
        ("photos/c.png", "Paths are relative to image_root; without it, to the folder of the data"),
    ],
)
def test_a_path_that_is_nearly_right(tmp_path, path, advice):
    (tmp_path / "photos").mkdir()
    for name in ("a.jpg", "b.PNG"):
        (tmp_path / "photos" / name).write_bytes(picture())
    with pytest.raises(ImageError, match="there is no such image file") as caught:
        ImageFolder(str(tmp_path)).find(path).open()
    assert advice in str(caught.value)
