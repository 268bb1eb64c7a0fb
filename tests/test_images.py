"""Image files of every kind come in as what they show; damaged ones are refused in one line."""

import numpy as np
import pytest
import torch
from PIL import Image

from idm_fast.images import InputError, crop, list_images, pad_to_block, read_image, read_luma, to_uint8, write_image


@pytest.fixture
def photo():
    """Smooth colour image, 37×45, uint8."""
    y, x = np.mgrid[0:37, 0:45]
    return np.stack([4 * x + y, 3 * y + x, 200 - 2 * x - y], -1).clip(0, 255).astype(np.uint8)


def bt601(rgb):
    """Luma in [0, 1] as ITU-R BT.601 defines it, before rounding to 8 bits."""
    return np.asarray(rgb, np.float64) @ [0.299, 0.587, 0.114] / 255


def test_luma_of_a_colour_image_is_bt601(tmp_path, photo):
    Image.fromarray(photo).save(tmp_path / "a.png")
    luma = read_luma(tmp_path / "a.png")
    assert luma.dtype == torch.float32 and luma.shape == (37, 45)
    assert np.abs(luma.numpy() - bt601(photo)).max() <= 1 / 255
    np.testing.assert_array_equal(np.round(luma.numpy() * 255), np.asarray(Image.fromarray(photo).convert("L")))


def test_rgb_keeps_the_channels_in_order(tmp_path, photo):
    Image.fromarray(photo).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png", "rgb")
    np.testing.assert_allclose(image.numpy(), photo.transpose(2, 0, 1) / 255, atol=1e-7)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bit_gray_keeps_all_its_bits(tmp_path, suffix):
    values = np.arange(40 * 40, dtype=np.uint16).reshape(40, 40) * 40 + 3
    Image.fromarray(values).save(tmp_path / f"deep.{suffix}")
    np.testing.assert_allclose(read_luma(tmp_path / f"deep.{suffix}").numpy(), values / 65535, atol=1e-7)


def test_16_bit_big_endian_tiff(tmp_path):
    values = np.arange(40 * 40, dtype=np.uint16).reshape(40, 40) * 40 + 3
    Image.frombytes("I;16B", (40, 40), values.astype(">u2").tobytes()).save(tmp_path / "deep.tiff")
    np.testing.assert_allclose(read_luma(tmp_path / "deep.tiff").numpy(), values / 65535, atol=1e-7)


def test_32_bit_integers_are_16_bit_values_or_refused(tmp_path):
    values = np.arange(32 * 32, dtype=np.int32).reshape(32, 32) * 64
    Image.fromarray(values).save(tmp_path / "a.tiff")
    np.testing.assert_allclose(read_luma(tmp_path / "a.tiff").numpy(), values / 65535, atol=1e-7)
    Image.fromarray(values * 100).save(tmp_path / "b.tiff")
    with pytest.raises(InputError, match="expected 0 to 65535"):
        read_luma(tmp_path / "b.tiff")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -0.1, 255.0])
def test_float_images_must_hold_0_to_1(tmp_path, bad):
    values = np.linspace(0, 1, 32 * 32, dtype=np.float32).reshape(32, 32)
    Image.fromarray(values).save(tmp_path / "a.tiff")
    np.testing.assert_array_equal(read_luma(tmp_path / "a.tiff").numpy(), values)
    values[3, 4] = bad
    Image.fromarray(values).save(tmp_path / "b.tiff")
    with pytest.raises(InputError, match="expected 0 to 1"):
        read_luma(tmp_path / "b.tiff")


def test_16_bit_colour_is_read_to_8_bits(tmp_path, photo):
    # Pillow cannot write 16-bit colour, so the file is put together here: 8-bit values times 257, PNG filter 0.
    import struct
    import zlib

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    deep = photo.astype(">u2") * 257
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    header = struct.pack(">IIBBBBB", 45, 37, 16, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "deep.png").write_bytes(png)
    image = read_image(tmp_path / "deep.png", "rgb")
    np.testing.assert_allclose(image.numpy(), photo.transpose(2, 0, 1) / 255, atol=1e-6)


def test_palette_image_shows_its_colours(tmp_path, photo):
    palette = Image.fromarray(photo).quantize(64)
    palette.save(tmp_path / "a.png")
    colours = np.asarray(palette.convert("RGB"))
    image = read_image(tmp_path / "a.png", "rgb")
    np.testing.assert_allclose(image.numpy(), colours.transpose(2, 0, 1) / 255, atol=1e-7)
    assert np.abs(read_luma(tmp_path / "a.png").numpy() - bt601(colours)).max() <= 1 / 255


def test_transparency_is_dropped_and_the_colour_below_counts(tmp_path, photo):
    alpha = np.full((37, 45, 1), 255, np.uint8)
    alpha[:, 20:] = 0
    Image.fromarray(np.concatenate([photo, alpha], -1)).save(tmp_path / "rgba.png")
    Image.fromarray(photo).save(tmp_path / "rgb.png")
    assert torch.equal(read_luma(tmp_path / "rgba.png"), read_luma(tmp_path / "rgb.png"))
    gray = photo[..., :1]
    Image.fromarray(np.concatenate([gray, alpha], -1), "LA").save(tmp_path / "la.png")
    np.testing.assert_allclose(read_luma(tmp_path / "la.png").numpy(), gray[..., 0] / 255, atol=1e-7)


@pytest.mark.filterwarnings("error")
def test_palette_with_transparent_entries(tmp_path, photo):
    palette = Image.fromarray(photo).quantize(16)
    palette.save(tmp_path / "opaque.png")
    palette.save(tmp_path / "clear.png", transparency=bytes([0, 128] + [255] * 14))
    assert torch.equal(read_luma(tmp_path / "clear.png"), read_luma(tmp_path / "opaque.png"))


def test_gray_1_bit_and_cmyk(tmp_path, photo):
    gray = photo[..., 0]
    Image.fromarray(gray).save(tmp_path / "l.png")
    np.testing.assert_allclose(read_luma(tmp_path / "l.png").numpy(), gray / 255, atol=1e-7)
    assert torch.equal(read_image(tmp_path / "l.png", "rgb"), read_image(tmp_path / "l.png").expand(3, -1, -1))
    Image.fromarray(gray > 100).save(tmp_path / "1.png")
    np.testing.assert_array_equal(read_luma(tmp_path / "1.png").numpy(), (gray > 100).astype(np.float32))
    Image.fromarray(photo).convert("CMYK").save(tmp_path / "cmyk.tiff")
    assert np.abs(read_luma(tmp_path / "cmyk.tiff").numpy() - bt601(photo)).max() <= 2 / 255


@pytest.mark.parametrize("orientation, turned", [(3, lambda a: a[::-1, ::-1]), (6, lambda a: np.rot90(a, -1))])
def test_exif_orientation_is_applied(tmp_path, photo, orientation, turned):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(photo[..., 0]).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_allclose(read_luma(tmp_path / "a.png").numpy(), turned(photo[..., 0]) / 255, atol=1e-7)


@pytest.mark.parametrize("content", [b"", b"not an image at all", b"\x89PNG\r\n\x1a\n", b"GIF89a\x01"])
def test_what_is_no_image_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_luma(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tiff", "bmp", "gif", "webp"])
def test_truncated_file_is_refused(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="a\\." + suffix):
        read_luma(path)


def test_missing_path_and_folder_are_told_apart(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_luma(tmp_path / "nothing.png")
    with pytest.raises(InputError, match="is a folder"):
        read_luma(tmp_path)


def test_written_image_is_clamped_rounded_and_read_back(tmp_path):
    image = torch.tensor([[-1.0, 0.0, 0.5, 1.0, 7.0, 100.4 / 255]])
    write_image(tmp_path / "gray.png", image)
    assert np.asarray(Image.open(tmp_path / "gray.png")).tolist() == [[0, 0, 128, 255, 255, 100]]
    colour = torch.rand(3, 9, 5, generator=torch.Generator().manual_seed(0))
    write_image(tmp_path / "colour.png", colour)
    torch.testing.assert_close(read_image(tmp_path / "colour.png", "rgb"), colour, atol=0.5001 / 255, rtol=0)
    assert to_uint8(colour[:1]).shape == (9, 5)


def test_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(InputError, match="cannot write"):
        write_image(tmp_path / "no_such_folder" / "a.png", torch.zeros(4, 4))
    (tmp_path / "a.png").mkdir()
    with pytest.raises(InputError, match="cannot write"):
        write_image(tmp_path / "a.png", torch.zeros(4, 4))
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_list_images_is_sorted_and_skips_the_rest(tmp_path):
    for name in ["b.PNG", "a.jpg", "notes.txt", ".hidden.png", "sub/c.tif"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.name for path in list_images(tmp_path)] == ["a.jpg", "b.PNG"]
    assert [path.name for path in list_images(tmp_path, recursive=True)] == ["a.jpg", "b.PNG", "c.tif"]


def test_list_images_of_an_empty_or_missing_folder(tmp_path):
    with pytest.raises(InputError, match="holds no images"):
        list_images(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        list_images(tmp_path / "nothing")


@pytest.mark.parametrize("size", [(32, 32), (33, 64), (95, 31), (1, 97)])
def test_padding_is_zeros_below_and_right_and_crop_undoes_it(size):
    x = torch.rand(2, *size, generator=torch.Generator().manual_seed(1)) + 1
    padded = pad_to_block(x, 32)
    assert all(side % 32 == 0 and 0 <= side - have < 32 for side, have in zip(padded.shape[1:], size, strict=True))
    assert torch.equal(crop(padded, size), x)
    assert padded.sum() == pytest.approx(x.sum().item(), rel=1e-6)
