"""Resize, convert and renditions, judged by the pixels that they write."""

import struct
from pathlib import Path

import pytest

from tasks.errors import AttemptLost
from tasks.media.formats import FORMATS, PILLOW_NAMES
from tasks.media.image import convert, renditions, resize
from tasks.media.options import ConversionOptions, RenditionsOptions, ResizeOptions
from tests.media.conftest import files_under, near, pixel

RED, GREEN, BLUE, WHITE = [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]


def corners(image):
    """Colours of the four quadrants of one frame: above left, above right, below left, below right."""
    x, y = image.width // 4, image.height // 4
    return [pixel(image, *at) for at in ((x, y), (3 * x, y), (x, 3 * y), (3 * x, 3 * y))]


def all_near(found, wanted, tolerance=6):
    return all(near(a, b, tolerance) for a, b in zip(found, wanted, strict=True))


def linear_gray_profile() -> bytes:
    """The smallest ICC profile of a gray scale that is proportional to light."""
    white = b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061)
    curve = b"curv" + bytes(8)
    text = b"desc" + bytes(4) + struct.pack(">I", 5) + b"gray\0" + bytes(78) + b"\0"
    tags, body, offset = [], b"", 132 + 12 * 3
    for name, content in ((b"wtpt", white), (b"kTRC", curve), (b"desc", text)):
        tags.append(struct.pack(">4sII", name, offset + len(body), len(content)))
        body += content + bytes(-len(content) % 4)
    header = struct.pack(">I4sI4s4s4s12x4s", 0, b"lcms", 0x02100000, b"mntr", b"GRAY", b"XYZ ", b"acsp")
    header += bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    header = header.ljust(128, b"\0") + struct.pack(">I", 3)
    whole = header + b"".join(tags) + body
    return struct.pack(">I", len(whole)) + whole[4:]


class TestResize:
    def test_the_result_names_output_format_dimensions_and_bytes(self, tmp_path, limits, photos):
        output = tmp_path / "new" / "out.webp"
        result = resize(str(photos / "landscape.jpg"), str(output), ResizeOptions(width=800), limits=limits)
        assert result == {
            "output": str(output),
            "format": "webp",
            "width": 800,
            "height": 600,
            "size_bytes": output.stat().st_size,
        }
        assert files_under(tmp_path) == {"new/out.webp"}

    @pytest.mark.parametrize("width", [1600, 1000, 900, 400, 200])
    def test_a_jpeg_gets_the_pixels_that_libvips_own_thumbnail_gives_it(
        self, tmp_path, limits, photos, load, vips, width
    ):
        source = str(photos / "landscape.jpg")
        resize(source, str(tmp_path / "out.png"), ResizeOptions(width=width), limits=limits)
        difference = load(tmp_path / "out.png") - vips.Image.thumbnail(source, width)
        assert difference.abs().max() == 0

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_every_exif_orientation_comes_out_upright(self, tmp_path, limits, quadrants, vips, load, orientation):
        stored = {  # what a camera stores, so that the picture shows upright: the inverse of the orientation
            1: lambda i: i,
            2: lambda i: i.fliphor(),
            3: lambda i: i.rot180(),
            4: lambda i: i.flipver(),
            5: lambda i: i.fliphor().rot270(),
            6: lambda i: i.rot270(),
            7: lambda i: i.fliphor().rot90(),
            8: lambda i: i.rot90(),
        }[orientation](quadrants).copy()
        stored.set_type(vips.GValue.gint_type, "orientation", orientation)
        stored.jpegsave(str(tmp_path / "in.jpg"), Q=95)

        resize(str(tmp_path / "in.jpg"), str(tmp_path / "small.png"), ResizeOptions(width=30), limits=limits)
        keep = ConversionOptions(quality=95, strip_metadata=False)
        convert(str(tmp_path / "in.jpg"), str(tmp_path / "same.jpg"), keep, limits=limits)

        small, same = load(tmp_path / "small.png"), load(tmp_path / "same.jpg")
        assert (small.width, small.height, same.width, same.height) == (30, 20, 60, 40)
        for image in (small, same):
            assert all_near(corners(image), [RED, GREEN, BLUE, WHITE], 12)
            assert not image.get_typeof("orientation") or image.get("orientation") == 1

    def test_cover_crops_at_the_centre(self, tmp_path, limits, quadrants, load):
        quadrants.pngsave(str(tmp_path / "in.png"))
        options = ResizeOptions(width=20, height=20, fit="cover")
        resize(str(tmp_path / "in.png"), str(tmp_path / "out.png"), options, limits=limits)
        image = load(tmp_path / "out.png")
        assert (image.width, image.height) == (20, 20)
        assert all_near(corners(image), [RED, GREEN, BLUE, WHITE], 2)

    def test_contain_pads_with_the_background(self, tmp_path, limits, quadrants, load):
        quadrants.pngsave(str(tmp_path / "in.png"))
        options = ResizeOptions(width=30, height=40, fit="contain", background="#102030")
        result = resize(str(tmp_path / "in.png"), str(tmp_path / "out.png"), options, limits=limits)
        image = load(tmp_path / "out.png")
        assert (result["width"], result["height"]) == (30, 40)
        assert pixel(image, 15, 0) == pixel(image, 15, 9) == pixel(image, 15, 30) == [0x10, 0x20, 0x30]
        assert near(pixel(image, 5, 12), RED, 2)

    def test_contain_pads_what_is_transparent_with_transparency(self, tmp_path, limits, plain, load):
        plain([9, 99, 199, 255]).pngsave(str(tmp_path / "in.png"))
        options = ResizeOptions(width=60, height=60, fit="contain")
        resize(str(tmp_path / "in.png"), str(tmp_path / "out.png"), options, limits=limits)
        image = load(tmp_path / "out.png")
        assert pixel(image, 30, 2)[3] == 0
        assert near(pixel(image, 30, 30), [9, 99, 199, 255], 1)

    def test_contain_gives_a_gray_image_the_colour_of_its_background(self, tmp_path, limits, plain, load):
        plain([77]).pngsave(str(tmp_path / "in.png"))
        options = ResizeOptions(width=60, height=60, fit="contain", background="red")
        resize(str(tmp_path / "in.png"), str(tmp_path / "out.png"), options, limits=limits)
        image = load(tmp_path / "out.png")
        assert (pixel(image, 30, 2), pixel(image, 30, 30)) == (RED, [77, 77, 77])

    def test_fill_stretches(self, tmp_path, limits, quadrants, load):
        quadrants.pngsave(str(tmp_path / "in.png"))
        options = ResizeOptions(width=20, height=40, preserve_aspect=False)
        resize(str(tmp_path / "in.png"), str(tmp_path / "out.png"), options, limits=limits)
        image = load(tmp_path / "out.png")
        assert (image.width, image.height) == (20, 40)
        assert all_near(corners(image), [RED, GREEN, BLUE, WHITE], 2)

    def test_nothing_is_enlarged_unless_told(self, tmp_path, limits, quadrants):
        quadrants.pngsave(str(tmp_path / "in.png"))
        arguments = str(tmp_path / "in.png"), str(tmp_path / "out.png")
        kept = resize(*arguments, ResizeOptions(width=600), limits=limits)
        enlarged = resize(*arguments, ResizeOptions(width=600, enlarge=True), limits=limits)
        assert (kept["width"], kept["height"]) == (60, 40)
        assert (enlarged["width"], enlarged["height"]) == (600, 400)

    def test_transparency_shows_the_background_in_a_jpeg_and_white_by_default(self, tmp_path, limits, plain, load):
        plain([255, 0, 0, 0]).pngsave(str(tmp_path / "in.png"))
        for background, wanted in (("white", WHITE), ("#00ff00", GREEN)):
            options = ResizeOptions(width=30, background=background, quality=95)
            resize(str(tmp_path / "in.png"), str(tmp_path / "out.jpg"), options, limits=limits)
            assert near(pixel(load(tmp_path / "out.jpg"), 10, 10), wanted)

    def test_transparent_pixels_lend_no_colour_to_their_neighbours(self, tmp_path, limits, plain, vips, load):
        halves = [plain([0, 0, 255, 255], 30, 40), plain([255, 0, 0, 0], 30, 40)]
        vips.Image.arrayjoin(halves, across=2).pngsave(str(tmp_path / "in.png"))
        resize(str(tmp_path / "in.png"), str(tmp_path / "out.png"), ResizeOptions(width=15), limits=limits)
        image = load(tmp_path / "out.png")
        seen = [pixel(image, x, 5) for x in range(15)]
        assert all(red <= 3 for red, _, _, alpha in seen if alpha > 25)
        assert (seen[0][3], seen[14][3]) == (255, 0)

    def test_half_transparency_survives_webp_and_png(self, tmp_path, limits, plain, load):
        plain([200, 60, 30, 128]).pngsave(str(tmp_path / "in.png"))
        for suffix in ("png", "webp", "avif", "tif"):
            output = tmp_path / f"out.{suffix}"
            resize(str(tmp_path / "in.png"), str(output), ResizeOptions(width=30), limits=limits)
            assert near(pixel(load(output), 10, 10), [200, 60, 30, 128], 8), suffix

    def test_gray_stays_gray(self, tmp_path, limits, photos, load):
        resize(str(photos / "gray.jpg"), str(tmp_path / "out.jpg"), ResizeOptions(width=300), limits=limits)
        assert load(tmp_path / "out.jpg").bands == 1

    def test_an_animation_keeps_frames_delays_and_loops_and_no_frame_bleeds(self, tmp_path, limits, roll, load):
        roll.gifsave(str(tmp_path / "in.gif"))
        for suffix in ("gif", "webp"):
            output = tmp_path / f"out.{suffix}"
            result = resize(str(tmp_path / "in.gif"), str(output), ResizeOptions(width=17), limits=limits)
            assert (result["width"], result["height"], result["frames"]) == (17, 13, 3)
            image = load(output, n=-1)
            assert image.get("delay") == [100, 200, 300]
            assert image.get("loop") == 3
            for frame, colour in enumerate((RED, GREEN, BLUE)):
                for y in (0, 6, 12):
                    assert near(pixel(image, 8, 13 * frame + y)[:3], colour, 4), (suffix, frame, y)

    def test_cover_crops_every_frame(self, tmp_path, limits, roll, load):
        roll.webpsave(str(tmp_path / "in.webp"), lossless=True)
        options = ResizeOptions(width=10, height=20, fit="cover")
        resize(str(tmp_path / "in.webp"), str(tmp_path / "out.gif"), options, limits=limits)
        image = load(tmp_path / "out.gif", n=-1)
        assert (image.width, image.get("page-height"), image.get("n-pages")) == (10, 20, 3)
        assert [pixel(image, 5, 10 + 20 * i)[:3] for i in range(3)] == [RED, GREEN, BLUE]

    def test_a_still_format_gets_the_first_frame(self, tmp_path, limits, roll, load):
        roll.gifsave(str(tmp_path / "in.gif"))
        result = resize(str(tmp_path / "in.gif"), str(tmp_path / "out.png"), ResizeOptions(width=20), limits=limits)
        assert (result["width"], result["height"], result.get("frames")) == (20, 15, None)
        assert pixel(load(tmp_path / "out.png"), 10, 14)[:3] == RED

    def test_no_metadata_is_written(self, tmp_path, limits, photos, load):
        resize(str(photos / "orientation-6.jpg"), str(tmp_path / "out.jpg"), ResizeOptions(width=300), limits=limits)
        fields = load(tmp_path / "out.jpg").get_fields()
        assert [name for name in fields if "exif" in name or "icc" in name or "xmp" in name] == []

    def test_every_real_photo_passes_with_all_its_harmless_warnings(self, tmp_path, limits, real_photos, load):
        for photo in real_photos:
            resize(str(photo), str(tmp_path / "out.jpg"), ResizeOptions(width=400, height=400), limits=limits)
            image = load(tmp_path / "out.jpg")
            assert max(image.width, image.height) == 400
            assert image.deviate() > 10


class TestConvert:
    @pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "avif", "tiff", "gif", "bmp", "heic"])
    def test_a_picture_keeps_its_colours_in_every_format(self, tmp_path, limits, plain, vips, suffix):
        colour = [200, 60, 30]
        plain(colour).pngsave(str(tmp_path / "in.png"))
        if suffix == "heic":
            pytest.importorskip("pillow_heif")
        output = tmp_path / f"out.{suffix}"
        result = convert(str(tmp_path / "in.png"), str(output), ConversionOptions(quality=95), limits=limits)
        assert (result["width"], result["height"], result["size_bytes"]) == (60, 40, output.stat().st_size)

        convert(str(output), str(tmp_path / "back.png"), ConversionOptions(), limits=limits)
        back = vips.Image.new_from_file(str(tmp_path / "back.png"))
        assert near(pixel(back, 30, 20)[:3], colour, 8)

    def test_jpeg_2000_is_read(self, tmp_path, limits, load):
        image = pytest.importorskip("PIL.Image")
        image.new("RGB", (60, 40), (200, 60, 30)).save(tmp_path / "in.jp2")
        convert(str(tmp_path / "in.jp2"), str(tmp_path / "out.png"), ConversionOptions(), limits=limits)
        assert near(pixel(load(tmp_path / "out.png"), 30, 20), [200, 60, 30], 2)

    @pytest.mark.parametrize("suffix", ["png", "webp", "avif", "tif"])
    def test_lossless_means_every_pixel(self, tmp_path, limits, photos, load, suffix):
        source = photos / "palette.png"
        output = tmp_path / f"out.{suffix}"
        convert(str(source), str(output), ConversionOptions(lossless=True), limits=limits)
        assert (load(output).extract_band(0, n=3) - load(source).extract_band(0, n=3)).abs().max() == 0

    def test_quality_sets_the_size(self, tmp_path, limits, photos):
        sizes = {}
        for quality in (30, 90):
            output = tmp_path / "out.webp"
            options = ConversionOptions(quality=quality)
            sizes[quality] = convert(str(photos / "gray.jpg"), str(output), options, limits=limits)["size_bytes"]
        assert sizes[30] * 2 < sizes[90]

    def test_format_names_what_the_suffix_does_not(self, tmp_path, limits, plain, load):
        plain([1, 2, 3]).pngsave(str(tmp_path / "in.png"))
        options = ConversionOptions(format="webp")
        result = convert(str(tmp_path / "in.png"), str(tmp_path / "out"), options, limits=limits)
        assert result["format"] == "webp"
        assert load(tmp_path / "out").get("vips-loader").startswith("webp")

    def test_the_content_decides_and_not_the_suffix(self, tmp_path, limits, plain, load):
        plain([200, 60, 30]).pngsave(str(tmp_path / "in.png"))
        (tmp_path / "in.png").rename(tmp_path / "in.jpg")
        convert(str(tmp_path / "in.jpg"), str(tmp_path / "out.png"), ConversionOptions(), limits=limits)
        assert pixel(load(tmp_path / "out.png"), 5, 5) == [200, 60, 30]

    def test_a_name_that_looks_like_loader_options_is_only_a_name(self, tmp_path, limits, roll, plain, load):
        roll.gifsave(str(tmp_path / "in.gif"))
        (tmp_path / "in.gif").rename(tmp_path / "in.gif[page=2]")
        convert(str(tmp_path / "in.gif[page=2]"), str(tmp_path / "o[Q=1].png"), ConversionOptions(), limits=limits)
        (tmp_path / "o[Q=1].png").rename(tmp_path / "out.png")
        assert pixel(load(tmp_path / "out.png"), 5, 5)[:3] == RED

    def test_sixteen_bits_are_kept_where_the_target_holds_them(self, tmp_path, limits, plain, load):
        deep = (plain([200, 60, 30]).cast("ushort") * 256 + 77).cast("ushort").copy(interpretation="rgb16")
        deep.pngsave(str(tmp_path / "in.png"))
        for suffix, sample, values in (
            ("png", "ushort", [51277, 15437, 7757]),
            ("tif", "ushort", [51277, 15437, 7757]),
            ("webp", "uchar", [200, 60, 30]),
            ("jpg", "uchar", [200, 60, 30]),
        ):
            output = tmp_path / f"out.{suffix}"
            options = ConversionOptions(lossless=suffix == "webp", quality=100)
            convert(str(tmp_path / "in.png"), str(output), options, limits=limits)
            image = load(output)
            assert image.format == sample
            assert near(pixel(image, 5, 5), values, 3 if suffix == "jpg" else 0), suffix

    def test_sixteen_bit_gray_stays_gray(self, tmp_path, limits, plain, load):
        deep = (plain([200]).cast("ushort") * 256 + 77).cast("ushort").copy(interpretation="grey16")
        deep.pngsave(str(tmp_path / "in.png"))
        for suffix, value in (("tif", [51277]), ("png", [51277]), ("jpg", [200])):
            convert(str(tmp_path / "in.png"), str(tmp_path / f"out.{suffix}"), ConversionOptions(), limits=limits)
            assert near(pixel(load(tmp_path / f"out.{suffix}"), 5, 5), value, 1)

    @pytest.mark.parametrize("profiled", [True, False])
    def test_cmyk_becomes_srgb(self, tmp_path, limits, plain, load, profiled):
        cmyk = plain([200, 60, 30]).icc_transform("cmyk", input_profile="srgb")
        cmyk.jpegsave(str(tmp_path / "in.jpg"), Q=98, keep="all" if profiled else "none")
        for run, options in ((resize, ResizeOptions(width=30)), (convert, ConversionOptions())):
            run(str(tmp_path / "in.jpg"), str(tmp_path / "out.png"), options, limits=limits)
            image = load(tmp_path / "out.png")
            assert (image.bands, image.interpretation) == (3, "srgb")
            assert near(pixel(image, 5, 5), [200, 60, 40], 12)

    def test_a_wide_gamut_becomes_srgb_and_its_profile_goes(self, tmp_path, limits, plain, load):
        wide = plain([200, 60, 30]).icc_transform("p3", input_profile="srgb")
        assert not near(pixel(wide, 5, 5), [200, 60, 30])
        wide.jpegsave(str(tmp_path / "in.jpg"), Q=98)
        for run, options in ((resize, ResizeOptions(width=30)), (convert, ConversionOptions())):
            run(str(tmp_path / "in.jpg"), str(tmp_path / "out.png"), options, limits=limits)
            image = load(tmp_path / "out.png")
            assert near(pixel(image, 5, 5), [200, 60, 30], 3)
            assert not image.get_typeof("icc-profile-data")

    def test_alpha_passes_a_conversion_of_the_profile_unchanged(self, tmp_path, limits, plain, load):
        wide = plain([200, 60, 30]).icc_transform("p3", input_profile="srgb").bandjoin(128)
        wide.pngsave(str(tmp_path / "in.png"))
        convert(str(tmp_path / "in.png"), str(tmp_path / "out.png"), ConversionOptions(), limits=limits)
        assert near(pixel(load(tmp_path / "out.png"), 5, 5), [200, 60, 30, 128], 3)

    def test_a_gray_profile_leaves_a_gray_image(self, tmp_path, limits, plain, load, vips):
        gray = plain([128]).copy()
        gray.set_type(vips.GValue.blob_type, "icc-profile-data", linear_gray_profile())
        gray.pngsave(str(tmp_path / "in.png"))
        convert(str(tmp_path / "in.png"), str(tmp_path / "out.png"), ConversionOptions(), limits=limits)
        image = load(tmp_path / "out.png")
        assert image.bands == 1
        assert near(pixel(image, 5, 5), [188], 2)  # half of the light, in sRGB's curve

    @pytest.mark.parametrize("noise", [b"no profile at all", b"\0" * 16 + b"RGB " + b"\0" * 200])
    def test_a_broken_profile_is_ignored(self, tmp_path, limits, plain, load, vips, noise):
        image = plain([200, 60, 30]).copy()
        image.set_type(vips.GValue.blob_type, "icc-profile-data", noise)
        image.tiffsave(str(tmp_path / "in.tif"))
        options = ConversionOptions(strip_metadata=False)
        convert(str(tmp_path / "in.tif"), str(tmp_path / "out.png"), options, limits=limits)
        assert pixel(load(tmp_path / "out.png"), 5, 5) == [200, 60, 30]

    def test_metadata_is_stripped_unless_told_and_then_kept_upright(self, tmp_path, limits, quadrants, vips, load):
        stored = quadrants.rot270().copy()
        stored.set_type(vips.GValue.gint_type, "orientation", 6)
        stored.set_type(vips.GValue.gstr_type, "exif-ifd0-Artist", "Ada (Ada, ASCII, 4 components, 4 bytes)")
        stored.set_type(vips.GValue.blob_type, "xmp-data", b"<x:xmpmeta xmlns:x='adobe:ns:meta/'/>")
        stored.jpegsave(str(tmp_path / "in.jpg"))

        for strip in (True, False):
            options = ConversionOptions(strip_metadata=strip)
            convert(str(tmp_path / "in.jpg"), str(tmp_path / "out.jpg"), options, limits=limits)
            image = load(tmp_path / "out.jpg")
            kept = {name for name in ("exif-ifd0-Artist", "xmp-data") if image.get_typeof(name)}
            assert kept == (set() if strip else {"exif-ifd0-Artist", "xmp-data"})
            assert (image.width, image.height) == (60, 40)
            assert not image.get_typeof("orientation") or image.get("orientation") == 1

    def test_an_animation_survives_the_change_of_format(self, tmp_path, limits, roll, load):
        roll.webpsave(str(tmp_path / "in.webp"), lossless=True)
        result = convert(str(tmp_path / "in.webp"), str(tmp_path / "out.gif"), ConversionOptions(), limits=limits)
        image = load(tmp_path / "out.gif", n=-1)
        assert (result["width"], result["height"], result["frames"]) == (40, 30, 3)
        assert image.get("delay") == [100, 200, 300]
        assert [pixel(image, 5, 5 + 30 * i)[:3] for i in range(3)] == [RED, GREEN, BLUE]

    def test_a_palette_and_its_transparent_entry_are_resolved(self, tmp_path, limits, load):
        image = pytest.importorskip("PIL.Image")
        picture = image.new("P", (60, 40), 1)
        picture.putpalette([255, 0, 0, 200, 60, 30, 0, 0, 255])
        picture.paste(2, (30, 0, 60, 40))
        picture.save(tmp_path / "in.png", transparency=2)
        convert(str(tmp_path / "in.png"), str(tmp_path / "out.webp"), ConversionOptions(lossless=True), limits=limits)
        written = load(tmp_path / "out.webp")
        assert pixel(written, 5, 5) == [200, 60, 30, 255]
        assert pixel(written, 45, 5)[3] == 0


class TestRenditions:
    def test_every_size_in_every_format_comes_from_one_call(self, tmp_path, limits, photos, load):
        options = RenditionsOptions(sizes=[800, 200, "300x100"], formats=["webp", "jpg"])
        told = []
        result = renditions(
            str(photos / "orientation-6.jpg"), str(tmp_path / "out"), options, limits=limits, progress=told.append
        )
        assert [(Path(o["output"]).name, o["width"], o["height"]) for o in result["outputs"]] == [
            ("orientation-6-800.webp", 800, 600),
            ("orientation-6-800.jpg", 800, 600),
            ("orientation-6-200.webp", 200, 150),
            ("orientation-6-200.jpg", 200, 150),
            ("orientation-6-300x100.webp", 133, 100),
            ("orientation-6-300x100.jpg", 133, 100),
        ]
        for output in result["outputs"]:
            image = load(output["output"])
            assert (image.width, image.height) == (output["width"], output["height"])
            assert Path(output["output"]).stat().st_size == output["size_bytes"]
        assert told == sorted(told)
        assert told[-1] == 100

    def test_a_rendition_looks_like_a_resize(self, tmp_path, limits, photos, load):
        source = str(photos / "landscape.jpg")
        options = RenditionsOptions(sizes=[1200, 300], formats=["png"])
        renditions(source, str(tmp_path), options, limits=limits)
        resize(source, str(tmp_path / "alone.png"), ResizeOptions(width=300), limits=limits)
        assert (load(tmp_path / "landscape-300.png") - load(tmp_path / "alone.png")).abs().avg() < 1.5

    def test_frames_go_where_they_can_be_held(self, tmp_path, limits, roll, load):
        roll.gifsave(str(tmp_path / "in.gif"))
        options = RenditionsOptions(sizes=[20, 10], formats=["webp", "png"])
        outputs = renditions(str(tmp_path / "in.gif"), str(tmp_path), options, limits=limits)["outputs"]
        assert [output.get("frames") for output in outputs] == [3, None, 3, None]
        assert load(tmp_path / "in-20.webp", n=-1).get("delay") == [100, 200, 300]
        assert pixel(load(tmp_path / "in-10.png"), 5, 7)[:3] == RED

    def test_all_of_them_appear_or_none(self, tmp_path, limits, photos):
        (tmp_path / "gray-100.webp").mkdir()
        options = RenditionsOptions(sizes=[200, 100], formats=["jpeg", "webp"])
        with pytest.raises(Exception, match=r"gray-100.webp"):
            renditions(str(photos / "gray.jpg"), str(tmp_path), options, limits=limits)
        assert files_under(tmp_path) == set()


class TestEveryFunction:
    def test_the_same_input_and_arguments_give_the_same_bytes(self, tmp_path, limits, photos, lacks):
        written = FORMATS.keys() - lacks()
        for name in ("orientation-6.jpg", "alpha.png", "animation.gif"):
            for suffix in written:
                seen = set()
                for attempt in "ab":
                    output = tmp_path / attempt / f"out.{suffix}"
                    resize(str(photos / name), str(output), ResizeOptions(width=64), limits=limits)
                    seen.add(output.read_bytes())
                assert len(seen) == 1, (name, suffix)

    def test_an_attempt_that_lost_its_job_writes_nothing(self, tmp_path, limits, photos):
        def confirm() -> None:
            raise AttemptLost("taken over")

        source = str(photos / "gray.jpg")
        with pytest.raises(AttemptLost):
            resize(source, str(tmp_path / "o.jpg"), ResizeOptions(width=9), limits=limits, confirm=confirm)
        with pytest.raises(AttemptLost):
            convert(source, str(tmp_path / "o.jpg"), ConversionOptions(), limits=limits, confirm=confirm)
        with pytest.raises(AttemptLost):
            renditions(source, str(tmp_path), RenditionsOptions(sizes=[9]), limits=limits, confirm=confirm)
        assert files_under(tmp_path) == set()

    def test_progress_of_a_large_image_is_told_in_rising_steps(self, tmp_path, limits, plain):
        plain([1, 2, 3], 6000, 4100).pngsave(str(tmp_path / "in.png"), compression=0)
        told: list[float] = []
        convert(
            str(tmp_path / "in.png"), str(tmp_path / "o.jpg"), ConversionOptions(), limits=limits, progress=told.append
        )
        assert 2 < len(told) <= 21
        assert told == sorted(told)
        assert told[-1] == 100

    def test_what_progress_raises_stops_the_work(self, tmp_path, limits, plain):
        plain([1, 2, 3], 6000, 4100).pngsave(str(tmp_path / "in.png"), compression=0)

        def cancelled(percent: float) -> None:
            raise AttemptLost(f"cancelled at {percent} %")

        with pytest.raises(AttemptLost, match=r"cancelled at \d"):
            convert(
                str(tmp_path / "in.png"),
                str(tmp_path / "o.jpg"),
                ConversionOptions(),
                limits=limits,
                progress=cancelled,
            )
        assert files_under(tmp_path) == {"in.png"}

    def test_no_installation_lacks_the_formats_of_libvips_itself(self, lacks):
        assert lacks().keys() <= {*PILLOW_NAMES, "avif"}
