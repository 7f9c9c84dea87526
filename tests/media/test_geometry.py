import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.media.geometry import Layout, layout
from tasks.media.options import FITS, ResizeOptions

sides = st.integers(1, 20_000)


def ratios_rounded_to(scaled: int, side: int) -> tuple[float, float]:
    """The scales that turn `side` into `scaled`, when a side never gets shorter than 1 px."""
    return (0 if scaled == 1 else (scaled - 0.5) / side), (scaled + 0.5) / side


@pytest.mark.parametrize(
    ("arguments", "scaled", "size"),
    [
        ({"width": 1600}, (1600, 1067), (1600, 1067)),
        ({"height": 400}, (600, 400), (600, 400)),
        ({"width": 500, "height": 500}, (500, 333), (500, 333)),
        ({"width": 500, "height": 500, "fit": "cover"}, (750, 500), (500, 500)),
        ({"width": 500, "height": 500, "fit": "contain"}, (500, 333), (500, 500)),
        ({"width": 500, "height": 500, "fit": "fill"}, (500, 500), (500, 500)),
        ({"width": 500, "fit": "fill"}, (500, 2000), (500, 2000)),
        ({"width": 500, "fit": "cover"}, (500, 333), (500, 333)),
        ({"width": 9000}, (3000, 2000), (3000, 2000)),
        ({"width": 9000, "enlarge": True}, (9000, 6000), (9000, 6000)),
        ({"width": 9000, "height": 500, "fit": "cover"}, (3000, 2000), (3000, 500)),
        ({"width": 4000, "height": 4000, "fit": "contain"}, (3000, 2000), (4000, 4000)),
        ({"width": 4000, "height": 10, "fit": "fill"}, (3000, 10), (3000, 10)),
    ],
)
def test_a_photo_of_3000_x_2000_goes_where_the_fit_says(arguments, scaled, size):
    assert layout(3000, 2000, ResizeOptions(**arguments)) == Layout(*scaled, *size)


@settings(deadline=None)
@given(width=sides, height=sides, box_width=sides, box_height=sides, fit=st.sampled_from(FITS), enlarge=st.booleans())
def test_every_layout_lies_in_its_box_and_keeps_the_aspect_unless_it_fills(
    width, height, box_width, box_height, fit, enlarge
):
    plan = layout(width, height, ResizeOptions(width=box_width, height=box_height, fit=fit, enlarge=enlarge))

    assert 1 <= plan.width_px <= box_width
    assert 1 <= plan.height_px <= box_height
    if not enlarge:
        assert plan.scaled_width_px <= width
        assert plan.scaled_height_px <= height
    if fit != "fill":
        ratios = ratios_rounded_to(plan.scaled_width_px, width), ratios_rounded_to(plan.scaled_height_px, height)
        assert max(low for low, _ in ratios) <= min(high for _, high in ratios) + 1e-9
    if enlarge and fit != "inside":
        assert (plan.width_px, plan.height_px) == (box_width, box_height)
    if fit == "inside" and enlarge:
        assert box_width == plan.width_px or box_height == plan.height_px
