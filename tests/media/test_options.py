import subprocess
import sys
from dataclasses import asdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.errors import InvalidArguments
from tasks.media.options import FITS, MAX_SIDE_PX, ConversionOptions, RenditionsOptions, ResizeOptions, parse_colour


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, ["neither width nor height", "at least one"]),
        ({"width": 0}, ["width is 0", "1 to 65,500 px"]),
        ({"width": -1}, ["width is -1", "1 to 65,500 px"]),
        ({"height": 10**9}, ["height is 1,000,000,000", "1 to 65,500 px"]),
        ({"width": True}, ["width is True, a bool", "whole number"]),
        ({"width": "800"}, ["width is '800', a str", "whole number"]),
        ({"width": 800.0}, ["width is 800.0, a float", "whole number"]),
        ({"width": 8, "fit": "insde"}, ["fit 'insde' is unknown", "did you mean inside?"]),
        ({"width": 8, "fit": 3}, ["fit 3 is unknown", "inside, cover, contain, fill"]),
        ({"width": 8, "fit": "inside", "preserve_aspect": False}, ["preserve_aspect=False contradicts fit='inside'"]),
        ({"width": 8, "fit": "fill", "preserve_aspect": True}, ["preserve_aspect=True contradicts fit='fill'"]),
        ({"width": 8, "preserve_aspect": "no"}, ["preserve_aspect is 'no'", "true or false"]),
        ({"width": 8, "enlarge": 1}, ["enlarge is 1, a int", "true or false"]),
        ({"width": 8, "quality": 0}, ["quality is 0", "1 to 100"]),
        ({"width": 8, "quality": 101}, ["quality is 101", "1 to 100"]),
        ({"width": 8, "quality": True}, ["quality is True", "1 to 100"]),
        ({"width": 8, "background": "whit"}, ["background 'whit'", "did you mean white?"]),
        ({"width": 8, "background": "#12345"}, ["background '#12345'", "#rrggbb"]),
        ({"width": 8, "background": None}, ["background is None", "a colour"]),
    ],
)
def test_a_resize_that_makes_no_sense_is_refused_with_argument_limit_and_remedy(arguments, words):
    with pytest.raises(InvalidArguments) as refused:
        ResizeOptions(**arguments)
    assert [word for word in words if word not in str(refused.value)] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"format": "wepb"}, ["format 'wepb' can't be written", "did you mean webp?"]),
        ({"format": "svg"}, ["format 'svg' can't be written"]),
        ({"format": 3}, ["format is 3"]),
        ({"quality": 1000}, ["quality is 1,000", "1 to 100"]),
        ({"lossless": "yes"}, ["lossless is 'yes'"]),
        ({"strip_metadata": 0}, ["strip_metadata is 0"]),
    ],
)
def test_a_conversion_that_makes_no_sense_is_refused(arguments, words):
    with pytest.raises(InvalidArguments) as refused:
        ConversionOptions(**arguments)
    assert [word for word in words if word not in str(refused.value)] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"sizes": []}, ["sizes is [], a list", "1 to 100 entries", "such as sizes=[400, '1600x900']"]),
        ({"sizes": 800}, ["sizes is 800, a int", "give a list", "such as sizes=[400, '1600x900']"]),
        ({"sizes": "100"}, ["sizes is '100', a str", "give a list", "such as sizes=[400, '1600x900']"]),
        ({"sizes": b"100"}, ["sizes is b'100', a bytes", "give a list"]),
        ({"sizes": {"w": 8}}, ["sizes is {'w': 8}, a dict", "give a list"]),
        ({"sizes": [0]}, ["sizes holds 0;", "1 to 65,500 px", "such as sizes=[400, '1600x900']"]),
        ({"sizes": [-1]}, ["sizes holds -1;", "1 to 65,500 px"]),
        ({"sizes": [10**9]}, ["sizes holds 1000000000;", "1 to 65,500 px"]),
        ({"sizes": ["100"]}, ["sizes holds '100';", "such as sizes=[400, '1600x900']"]),
        ({"sizes": [True]}, ["sizes holds True;", "whole numbers"]),
        ({"sizes": [1.5]}, ["sizes holds 1.5;", "whole numbers"]),
        ({"sizes": [None]}, ["sizes holds None;", "whole numbers"]),
        ({"sizes": [[8, 6]]}, ["sizes holds [8, 6];", "a box of width x height"]),
        ({"sizes": ["8 x 6"]}, ["sizes holds '8 x 6';", "a box of width x height"]),
        ({"sizes": ["0x6"]}, ["sizes holds '0x6';", "1 to 65,500 px"]),
        ({"sizes": ["6x70000"]}, ["sizes holds '6x70000';", "1 to 65,500 px"]),
        ({"sizes": [8], "formats": "webp"}, ["formats is 'webp', a str", "such as formats=['webp', 'jpeg']"]),
        ({"sizes": [8], "formats": [["webp"]]}, ["format is ['webp']", "give one of jpeg"]),
        ({"sizes": [800, 800]}, ["sizes names an entry twice"]),
        ({"sizes": [800], "formats": ["jpg", "jpeg"]}, ["formats names an entry twice"]),
        ({"sizes": [800], "formats": []}, ["formats is []"]),
        ({"sizes": list(range(1, 102))}, ["makes 101 outputs", "the limit is 100"]),
    ],
)
def test_renditions_that_make_no_sense_are_refused(arguments, words):
    with pytest.raises(InvalidArguments) as refused:
        RenditionsOptions(**arguments)
    assert [word for word in words if word not in str(refused.value)] == []


def test_preserve_aspect_is_a_shorthand_for_fit():
    assert ResizeOptions(width=8).fit == "inside"
    assert ResizeOptions(width=8, preserve_aspect=True).fit == "inside"
    assert ResizeOptions(width=8, preserve_aspect=False).fit == "fill"
    assert ResizeOptions(width=8, height=8, fit="cover", preserve_aspect=True).fit == "cover"


def test_the_output_suffix_decides_the_format():
    assert ResizeOptions(width=8).format_for("/a/b.JPG").name == "jpeg"
    assert ResizeOptions(width=8).format_for("/a/b.tif").name == "tiff"
    assert ConversionOptions(format="jpg").format_for("/a/no-suffix").name == "jpeg"


@pytest.mark.parametrize(
    ("output", "options", "words"),
    [
        ("/a/b.jpgg", ConversionOptions(), ["/a/b.jpgg", "the suffix .jpgg can't be written", "did you mean jpg?"]),
        ("/a/b.xyz", ConversionOptions(), ["the suffix .xyz can't be written", "choose from jpg"]),
        ("/a/b.mp4", ConversionOptions(), ["the suffix .mp4 can't be written; choose from jpg, jpeg, jpe, jfif, png"]),
        ("/a/b.pgn", ConversionOptions(), ["did you mean png? Choose from jpg, "]),
        ("/a/b.wepb", ConversionOptions(), ["did you mean webp? Choose from jpg, "]),
        ("/a/b", ConversionOptions(), ["/a/b has no suffix", "or give format"]),
        ("/a/b.jpg", ConversionOptions(format="png"), ["suffix of jpeg", "format says png"]),
        ("/a/b.jpg", ConversionOptions(lossless=True), ["jpeg is always lossy", "drop lossless"]),
    ],
)
def test_an_output_that_can_not_be_written_as_asked_is_refused(output, options, words):
    with pytest.raises(InvalidArguments) as refused:
        options.format_for(output)
    assert [word for word in words if word not in str(refused.value)] == []


def test_a_task_without_a_format_argument_asks_for_a_suffix_only():
    with pytest.raises(InvalidArguments, match=r"/a/b has no suffix; add one of jpg, .*, jxl$"):
        ResizeOptions(width=8).format_for("/a/b")


def test_colours_are_names_or_hexadecimal():
    assert parse_colour("White") == (255, 255, 255)
    assert parse_colour("#fc0") == (255, 204, 0)
    assert parse_colour("#FFCC01") == (255, 204, 1)


numbers = st.one_of(st.none(), st.integers(-5, MAX_SIDE_PX + 5), st.booleans(), st.text(max_size=3), st.floats())


@settings(deadline=None, max_examples=50)
@given(
    width=numbers,
    height=numbers,
    fit=st.one_of(st.none(), st.sampled_from(FITS), st.text(max_size=6)),
    preserve_aspect=st.one_of(st.none(), st.booleans()),
    quality=st.integers(-1, 102),
    background=st.one_of(st.text(max_size=8), st.from_regex(r"#[0-9a-f]{3,6}", fullmatch=True)),
)
def test_options_are_either_sensible_or_refused_and_survive_a_round_trip(**arguments):
    try:
        options = ResizeOptions(**arguments)
    except InvalidArguments:
        return
    assert options.fit in FITS
    assert options.width or options.height
    assert ResizeOptions(**asdict(options)) == options


def test_importing_the_options_loads_no_media_engine():
    code = (
        "import sys, tasks.media.options, tasks.media.sniff, tasks.media.image\n"
        "print(sorted({'pyvips', 'PIL', 'numpy', 'pillow_heif', 'celery', 'kombu', 'sqlalchemy'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
