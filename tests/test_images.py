"""Images, as caption_llava.py and train_clip.py both read them: pixels as they look, and what is no image under the root."""
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

import caption_llava
import train_clip

GRADIENT = np.stack(np.broadcast_arrays(*np.ogrid[0:240:6, 0:240:4], 90), -1).astype(np.uint8)  # [40, 60, 3]


def save_pictures(root):
    """Readable pictures of every kind. -> {name: (expected RGB pixels, largest difference)}"""
    rgb = Image.fromarray(GRADIENT)
    clear = np.dstack([GRADIENT, np.where(np.arange(60) < 30, 0, 255)[None].repeat(40, 0).astype(np.uint8)])
    on_white = np.where(clear[..., 3:] == 0, 255, GRADIENT).astype(np.uint8)
    palette = rgb.quantize(64)
    grey = np.array(rgb.convert("L"))
    grey_rgb = grey[..., None].repeat(3, -1)
    expected = {"rgb.png": (GRADIENT, 0), "rgba.png": (on_white, 0), "palette.png": (np.array(palette.convert("RGB")), 0),
                "grey.png": (grey_rgb, 0), "cmyk.jpg": (GRADIENT, 40), "in\u00a0\u732b.webp": (GRADIENT, 0),
                "clear.gif": (None, 0),
                "one.png": (GRADIENT[:1, :1], 0), "wide.png": (GRADIENT[:1], 0), "tall.png": (GRADIENT[:, :1], 0)}
    rgb.save(root / "rgb.png")
    Image.fromarray(clear).save(root / "rgba.png")
    palette.save(root / "palette.png")
    Image.fromarray(grey).save(root / "grey.png")
    rgb.convert("CMYK").save(root / "cmyk.jpg", quality=95)
    rgb.save(root / "in\u00a0\u732b.webp", lossless=True)
    palette.save(root / "clear.gif", transparency=0)
    for name in ("one", "wide", "tall"):
        Image.fromarray(np.ascontiguousarray(expected[f"{name}.png"][0])).save(root / f"{name}.png")
    (root.parent / "elsewhere").mkdir()  # as a model hub's cache does: what the user linked there is the user's
    rgb.save(root.parent / "elsewhere" / "blob.png")
    os.symlink(root.parent / "elsewhere", root / "up")
    os.symlink(root.parent / "elsewhere" / "blob.png", root / "blob.png")
    expected |= {name: (GRADIENT, 0) for name in ("blob.png", "up/blob.png", str(root / "rgb.png"), "./rgb.png")}
    exif = Image.Exif()
    for name, tag in (("turned.png", 6), ("turned.webp", 6), ("turned.tif", 6), ("mirrored.avif", 2), ("turned.jpg", 8)):
        exif[274] = tag
        rgb.save(root / name, exif=exif, quality=95)
        expected[name] = (GRADIENT[:, ::-1] if tag == 2 else np.rot90(GRADIENT, -1 if tag == 6 else 1)), 40
    rgb.save(root / "broken-exif.png", exif=b"Exif\0\0garbage" + bytes(9))  # says nothing of how it is turned
    expected["broken-exif.png"] = GRADIENT, 0
    with tarfile.open(root / "shard.tar", "w") as tar:
        for name in ("grey.png", "rgb.png"):
            tar.add(root / name, name)
    with tarfile.open(root / "shard.tar") as tar:
        for info in tar:
            expected[f"shard.tar@{info.offset_data}+{info.size}"] = expected[info.name]
    return expected


def save_faults(root):
    """Values of "image" that are no readable picture under the root. -> {value: a part of the reason}"""
    data, grey = (root / "rgb.png").read_bytes(), GRADIENT[..., 0]
    Image.fromarray(GRADIENT).save(root.parent / "outside.png")
    Image.fromarray(GRADIENT).save(f"{root}-2.png")  # its path begins as the root's does
    Image.fromarray(grey.astype(np.float32)).save(root / "float.tif")
    Image.fromarray(grey.astype(np.int32) * 99).save(root / "32bit.tif")
    for name in ("16bit.tif", "16bit.png"):
        Image.fromarray(grey.astype(np.uint16) * 16).save(root / name)
    (root / "12bit.pgm").write_bytes(b"P5\n60 40\n4095\n" + (grey.astype(">u2") * 16).tobytes())
    Image.fromarray(GRADIENT).save(root / "x.eps")  # Pillow would hand it to Ghostscript
    for name, content in (("empty.png", b""), ("cut.png", data[:len(data) // 2]), ("text.jpg", b"hello"),
                          ("svg.svg", b"<svg/>"), ("bits.png", data[:60] + bytes(60) + data[120:]), ("eps.jpg", (root / "x.eps").read_bytes())):
        (root / name).write_bytes(content)
    Image.new("RGB", (6000, 1)).save(root / "line.png")  # 28 pixels high it would be 168,000 wide
    size, no_image = (root / "shard.tar").stat().st_size, "cannot identify"
    return {f"{root}-2.png": "outside", "float.tif": "grey of mode F", "32bit.tif": "grey of mode I", "16bit.tif": "grey of mode I;16", "16bit.png": "grey of mode I;16", "12bit.pgm": "grey of mode I",
            "../outside.png": "outside", "up/../../outside.png": "outside", "../root-2.png": "outside", str(root.parent / "outside.png"): "outside",
            "/etc/passwd": "outside", "../outside.png@0+500": "outside", ".": "Error", "": "no image", None: "no image", 7: "no image",
            "missing.png": "FileNotFound", "empty.png": no_image, "cut.png": "OSError", "text.jpg": no_image, "svg.svg": no_image,
            "bits.png": "Error", "eps.jpg": no_image, "a\0b": "ValueError", "\ud800.png": "Error", "x" * 5000: "OSError", "line.png": "no image",
            "shard.tar": no_image, f"shard.tar@{size}+10": no_image, "shard.tar@0+99999999999999999999": "Error",
            "shard.tar@99999999999999999999+5": "Error", "shard.tar@9000000000000000000+5": "Error"}


@pytest.mark.parametrize("script", [caption_llava, train_clip])
def test_pictures_are_read_as_they_look(script, tmp_path):
    (tmp_path / "root").mkdir()
    for name, (pixels, tolerance) in save_pictures(tmp_path / "root").items():
        image = script.to_rgb(script.open_image(str(tmp_path / "root"), name))
        assert image.mode == "RGB"
        if pixels is not None:
            assert image.size == pixels.shape[1::-1], name
            assert np.abs(np.array(image).astype(int) - pixels).max() <= tolerance, name


@pytest.mark.parametrize("script", [caption_llava, train_clip])
def test_what_is_no_picture_is_an_error_with_a_reason(script, tmp_path):
    (tmp_path / "root").mkdir()
    save_pictures(tmp_path / "root")
    for name, reason in save_faults(tmp_path / "root").items():
        if isinstance(name, str) and name:  # training has no row without a name
            with pytest.raises(Exception) as error:
                script.to_rgb(script.open_image(str(tmp_path / "root"), name))
            assert reason in repr(error.value), name


def test_both_scripts_have_the_same_formats():
    assert tuple(caption_llava.FORMATS) == tuple(train_clip.FORMATS)
