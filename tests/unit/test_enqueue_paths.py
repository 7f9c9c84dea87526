"""MEDIA_ROOTS at a producer: what lies outside is an error at the call; without them it is left to the workers."""

import pytest

from tasks.errors import PathNotAllowed
from tests.acceptance.deployment import deployed

TASKS = {
    "image_resize": ("out.webp", {"width": 9}),
    "image_conversion": ("out.webp", {}),
    "image_renditions": ("out", {"sizes": [9]}),
}


@pytest.fixture
def root(tmp_path):
    (tmp_path / "media").mkdir()
    return tmp_path / "media"


@pytest.fixture
def limited(server_dir, tmp_path, root):
    """A producer that may only name what lies in one directory."""
    with deployed(server_dir, tmp_path, {"MEDIA_ROOTS": root}) as deployment:
        yield deployment


@pytest.mark.parametrize("task", TASKS)
def test_a_path_outside_of_the_roots_is_an_error_at_the_call(limited, tmp_path, root, task):
    name, arguments = TASKS[task]
    submit = limited.app.tasks[task].delay

    for outside, call in {
        tmp_path / "in.jpg": lambda path: submit(path, root / name, **arguments),
        tmp_path / name: lambda path: submit(root / "in.jpg", path, **arguments),
        root / ".." / name: lambda path: submit(root / "in.jpg", path, **arguments),
    }.items():
        with pytest.raises(PathNotAllowed) as caught:
            call(outside)
        assert f"{outside} lies outside of {root} (MEDIA_ROOTS); move it there" in str(caught.value)

    assert limited.app.store.jobs() == []


@pytest.mark.parametrize("task", TASKS)
def test_a_path_inside_of_the_roots_is_let_through(limited, root, task):
    name, arguments = TASKS[task]

    job = limited.app.tasks[task].delay(root / "in.jpg", root / "made" / name, **arguments)

    assert limited.row(job)["status"] == "queued"


def test_a_link_that_leads_out_of_the_roots_is_an_error_at_the_call(limited, tmp_path, root):
    (root / "link.jpg").symlink_to(tmp_path / "in.jpg")

    with pytest.raises(PathNotAllowed, match=r"link\.jpg lies outside of .* \(MEDIA_ROOTS\)"):
        limited.task.image_resize.delay(root / "link.jpg", root / "out.webp", width=9)


def test_a_root_may_itself_be_reached_by_a_link(limited, tmp_path, root):
    (tmp_path / "shortcut").symlink_to(root)

    job = limited.task.image_resize.delay(tmp_path / "shortcut" / "in.jpg", root / "out.webp", width=9)

    assert limited.row(job)["status"] == "queued"


def test_a_producer_without_roots_leaves_it_to_the_worker(producer, tmp_path):
    job = producer.task.image_resize.delay(tmp_path / "in.jpg", tmp_path / "out.webp", width=9)

    assert producer.row(job)["status"] == "queued"
