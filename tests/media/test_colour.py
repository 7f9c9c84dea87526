from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tasks.media.colour import colour_space, is_srgb


def profile(vips: Any, name: str) -> bytes:
    image = vips.Image.black(1, 1, bands=3).copy(interpretation="srgb")
    return image.icc_transform(name, input_profile="srgb").get("icc-profile-data")


def test_the_engines_srgb_profile_is_srgb(vips):
    assert is_srgb(profile(vips, "srgb"))


@pytest.mark.parametrize("name", ["p3", "cmyk"])
def test_a_profile_of_another_space_is_not(vips, name):
    assert not is_srgb(profile(vips, name))


def test_pillows_srgb_profile_is_srgb_and_its_lab_is_not():
    image_cms = pytest.importorskip("PIL.ImageCms")
    made = {name: image_cms.ImageCmsProfile(image_cms.createProfile(name)).tobytes() for name in ("sRGB", "LAB")}
    assert is_srgb(made["sRGB"])
    assert colour_space(made["LAB"]) == "Lab"
    assert not is_srgb(made["LAB"])


def test_srgb_primaries_under_another_tone_curve_are_not_srgb(vips):
    bent = profile(vips, "srgb").replace(b"para\0\0\0\0\0\x03\0\0\0\x02\x66", b"para\0\0\0\0\0\x03\0\0\0\x01\x66")
    assert bent != profile(vips, "srgb")
    assert not is_srgb(bent)


@settings(deadline=None, max_examples=50)
@given(st.binary(max_size=300))
def test_what_can_not_be_read_is_not_srgb(noise):
    assert not is_srgb(noise)


@settings(deadline=None, max_examples=50)
@example(cut=467, noise=b"\x00\x80")  # a negative base under a broken exponent
@given(cut=st.integers(0, 470), noise=st.binary(min_size=1, max_size=20))
def test_a_damaged_profile_never_raises(vips, cut, noise):
    whole = profile(vips, "srgb")
    assert is_srgb(whole[:cut] + noise + whole[cut + len(noise) :]) in (True, False)
