from tasks.media.samples import make_photos


def test_the_set_shows_every_difficult_kind_of_image(photos, load):
    large, turned = load(photos / "landscape.jpg"), load(photos / "orientation-6.jpg")
    assert (large.width, large.height) == (4000, 3000)
    assert (turned.width, turned.height, turned.get("orientation")) == (3000, 4000, 6)
    assert load(photos / "alpha.png").bands == 4
    assert load(photos / "cmyk.jpg").interpretation == "cmyk"
    assert load(photos / "gray.jpg").bands == 1
    assert load(photos / "16-bit.png").format == "ushort"
    assert load(photos / "palette.png").get("palette") == 1
    assert load(photos / "display-p3.jpg").get_typeof("icc-profile-data")
    for name in ("animation.gif", "animation.webp"):
        roll = load(photos / name, n=-1)
        assert (roll.get("n-pages"), roll.get("delay")[:2]) == (12, [200, 80])
    assert (photos / "broken-cut-off.jpg").exists()


def test_the_set_is_the_same_each_time(photos, tmp_path):
    made = make_photos(tmp_path)
    assert len(made) == 11
    assert [path.name for path in made if path.read_bytes() != (photos / path.name).read_bytes()] == []
