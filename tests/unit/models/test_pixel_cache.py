"""Images kept on disk give the model the same floats, bit by bit, and are never stale."""

from __future__ import annotations

import logging
import os
import pickle
import shutil
from collections import namedtuple

import pytest
import torch
from torch.utils.data import DataLoader

from tests.pictures import encode, noise, picture
from tests.unit.models.families import family_path, load
from vembed.config import TrainConfig
from vembed.errors import ConfigError, DataError
from vembed.images import ImageBytes, ImageFolder, ImageInMemory, ImageInTar, ImageLimits
from vembed.models import pixel_cache
from vembed.models.pixel_cache import PixelCache
from vembed.modes import Item
from vembed.training.image_cache import cache_images

FAMILIES = ["clip", "siglip", "vit", "dinov2", "dinov2_with_registers", "mae", "composed"]


def turned(orientation: int, **kwargs) -> bytes:
    image = noise(**kwargs)
    image.getexif()[0x0112] = orientation
    return encode(image, "JPEG", exif=image.getexif())


def pictures() -> list[bytes]:
    """Of several formats, shapes and modes."""
    grey = noise(seed=1).convert("L")
    clear = noise((50, 70), seed=2).convert("RGBA")
    clear.putalpha(grey.resize((50, 70)))
    kinds = [encode(noise()), encode(grey), encode(clear), encode(noise(seed=3), "WEBP")]
    return [*kinds, picture("red", (3, 200)), picture("blue", (32, 32)), turned(6, seed=4)]


def as_items(images, **kwargs) -> list[Item]:
    return [Item(image=ImageBytes(data, **kwargs)) for data in images]


def processor_of(family: str):
    processor = load(family_path(family)).processor
    return getattr(processor, "image", processor)


@pytest.fixture
def processor():
    return processor_of("clip")


@pytest.fixture
def cached(processor, tmp_path):
    """A processor with a cache."""
    other = processor_of("clip")
    other.cache = PixelCache(tmp_path / "cache", processor.image_processor)
    return other


@pytest.fixture
def decoded(monkeypatch):
    """The images that a cache decodes."""
    sources = []
    decode = pixel_cache.load_image
    monkeypatch.setattr(
        pixel_cache, "load_image", lambda source: sources.append(source) or decode(source)
    )
    return sources


def stored(folder) -> list:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("family", FAMILIES)
def test_pixels_are_the_processors_bit_by_bit(family, tmp_path, decoded):
    encoder = load(family_path(family))
    encoder.processor = load(family_path(family)).processor
    items = as_items(pictures())
    expected = encoder.processor(items, role="document")
    cache_images(
        encoder, TrainConfig(image_cache=str(tmp_path), retrieval_mode="i2i", model_name="m")
    )
    for _ in range(2):
        found = encoder.processor(items, role="document")
        assert found.keys() == expected.keys()
        pixels, wanted = found["pixel_values"], expected["pixel_values"]
        assert (pixels.dtype, pixels.stride()) == (wanted.dtype, wanted.stride())
        assert torch.equal(pixels, wanted)
    assert len(decoded) == len(items), "each once"
    # Some known, some not.
    more = as_items([*pictures()[:2], encode(noise(seed=9))])
    plain = processor_of(family)(more, role="document")
    assert torch.equal(encoder.processor(more, role="document")["pixel_values"],
                       plain["pixel_values"])  # fmt: skip
    assert len(decoded) == len(items) + 1


@pytest.mark.parametrize("family", ["siglip2", "qwen2_vl", "llava", "bert"])
def test_what_has_no_images_of_one_shape_is_refused(family, tmp_path):
    config = TrainConfig(model_name="owner/name", image_cache=str(tmp_path / "new"))
    with pytest.raises(ConfigError, match="every image the same size.*image_cache: null"):
        cache_images(load(family_path(family)), config)
    assert not (tmp_path / "new").exists()


def own(kind, module: str = "transformers.own"):
    """A processor of CLIP's with a method of its own, that could have come with transformers."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    names = {"__module__": module, "__doc__": "", "__call__": kind}
    return type("Own", (CLIPImageProcessorPil,), names)(size=32, crop_size=32)


def plain_call(self, images, **kwargs):
    return super(type(self), self).__call__(images, **kwargs)


def noisy_call(self, images, **kwargs):
    batch = plain_call(self, images, **kwargs)
    return batch | {"pixel_values": batch["pixel_values"] + torch.rand(1)}


def contrasting_call(self, images, **kwargs):
    """Each image less its own mean: not byte by byte."""
    batch = plain_call(self, images, **kwargs)
    pixels = batch["pixel_values"].float()
    is_scaled = kwargs.get("do_normalize", True)
    return batch | {"pixel_values": pixels - pixels.mean()} if is_scaled else batch


def test_a_processor_is_taken_by_what_it_does(tmp_path):
    assert PixelCache(tmp_path, own(plain_call)).shape == (3, 32, 32)
    for call in (noisy_call, contrasting_call):
        with pytest.raises(ConfigError, match="Received: Own, which does not"):
            PixelCache(tmp_path, own(call))


def test_code_that_came_with_a_model_is_not_trusted_to_stay(tmp_path):
    with pytest.raises(ConfigError, match="image processors of transformers"):
        PixelCache(tmp_path, own(plain_call, module="transformers_modules.own"))


def test_images_of_any_size_are_refused(tmp_path, processor):
    processor.image_processor.do_center_crop = False
    with pytest.raises(ConfigError, match="every image the same size"):
        PixelCache(tmp_path, processor.image_processor)


def test_other_settings_have_a_folder_of_their_own(tmp_path, processor):
    first = PixelCache(tmp_path, processor.image_processor)
    assert PixelCache(tmp_path, processor_of("clip").image_processor).folder == first.folder
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    assert PixelCache(tmp_path, processor.image_processor).folder != first.folder


class TestAnImageThatChanges:
    @pytest.fixture
    def read(self, tmp_path, cached, processor):
        """Reads `a.png` through the cache; it must be what it is without."""
        folder = ImageFolder(str(tmp_path))

        def pixels():
            items = [Item(image=folder.find("a.png"))]
            found = cached.pixels(items)["pixel_values"]
            assert torch.equal(found, processor.pixels(items)["pixel_values"])
            return found

        return pixels

    def test_is_read_again(self, tmp_path, read, decoded):
        path = tmp_path / "a.png"
        path.write_bytes(encode(noise(seed=1), "BMP"))
        first = read()
        time = path.stat().st_mtime_ns
        # Of the same size.
        path.write_bytes(encode(noise(seed=2), "BMP"))
        os.utime(path, ns=(time, time + 1))
        assert not torch.equal(read(), first)
        read()
        assert len(decoded) == 2

    def test_that_is_gone_is_an_error(self, tmp_path, read):
        (tmp_path / "a.png").write_bytes(picture())
        read()
        (tmp_path / "a.png").unlink()
        with pytest.raises(DataError, match="no such image file"):
            read()

    @pytest.mark.parametrize(
        ("limits", "message"),
        [({"max_pixels": 10}, "more than 10 pixels"), ({"max_bytes": 10}, "larger than")],
    )
    def test_is_held_to_the_limits_of_this_run(self, tmp_path, read, cached, limits, message):
        (tmp_path / "a.png").write_bytes(picture())
        read()
        source = ImageFolder(str(tmp_path), limits=ImageLimits(**limits)).find("a.png")
        with pytest.raises(DataError, match=message):
            cached.pixels([Item(image=source)])


def test_images_in_tar_files_in_memory_and_in_bytes(tmp_path, cached, processor, decoded):
    data = [encode(noise(seed=n)) for n in range(2)]
    (tmp_path / "a.tar").write_bytes(b"".join(data))
    sizes = [len(one) for one in data]
    upright, on_its_side = noise(seed=5), noise(seed=5)
    on_its_side.getexif()[0x0112] = 6
    images = [
        ImageInTar(str(tmp_path / "a.tar"), "0", 0, sizes[0]),
        ImageInTar(str(tmp_path / "a.tar"), "1", sizes[0], sizes[1]),
        ImageInMemory(upright),
        ImageInMemory(on_its_side),
        ImageBytes(picture("green")),
    ]
    items = [Item(image=image) for image in images]
    expected = processor.pixels(items)["pixel_values"]
    for _ in range(2):
        assert torch.equal(cached.pixels(items)["pixel_values"], expected)
    assert len(decoded) == len(items)
    (tmp_path / "a.tar").unlink()
    with pytest.raises(DataError, match="a shard must be readable"):
        cached.pixels(items[:1])


def cut(data: bytes) -> bytes:
    return data[:-1]


def longer(data: bytes) -> bytes:
    return data + b"\0"


def zeros(data: bytes) -> bytes:
    """As after a loss of power: the length is there, the content is not."""
    return bytes(len(data) // 2) + data[len(data) // 2 :]


@pytest.mark.parametrize("damage", [cut, longer, zeros, lambda data: b""])
def test_a_damaged_file_is_made_again(damage, cached, processor, decoded):
    items = as_items([encode(noise())])
    expected = cached.pixels(items)["pixel_values"]
    (path,) = stored(cached.cache.folder)
    whole = path.read_bytes()
    assert len(whole) == cached.cache.image_bytes
    path.write_bytes(damage(whole))
    assert torch.equal(cached.pixels(items)["pixel_values"], expected)
    assert path.read_bytes() == whole
    assert len(decoded) == 2


def test_a_full_disk_is_told_once_and_ends_nothing(cached, processor, monkeypatch, caplog):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40, 2**29))
    items = as_items(pictures())
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            found = cached.pixels(items)["pixel_values"]
            assert torch.equal(found, processor.pixels(items)["pixel_values"])
    (message,) = caplog.messages
    assert "takes no more images (less than 1 GiB is free)" in message
    assert stored(cached.cache.folder) == []


def test_a_write_that_fails_leaves_nothing(cached, monkeypatch, caplog):
    def fail(self, data):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pixel_cache.Path, "write_bytes", fail)
    with caplog.at_level(logging.WARNING):
        cached.pixels(as_items(pictures()[:2]))
    assert "No space left on device" in caplog.text
    assert stored(cached.cache.folder) == []


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path, processor):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="image_cache: a folder that can be written.*/file'"):
        PixelCache(tmp_path / "file", processor.image_processor)


def test_workers_share_it(cached, processor, decoded):
    items = as_items(pictures() * 2)
    loader = DataLoader(items, batch_size=3, num_workers=2, collate_fn=cached.pixels)
    found = torch.cat([batch["pixel_values"] for batch in loader])
    assert torch.equal(found, processor.pixels(items)["pixel_values"])
    assert len(stored(cached.cache.folder)) == len(pictures())
    pickle.loads(pickle.dumps(cached)).pixels(items)
    assert decoded == [], "all of it by the workers"
