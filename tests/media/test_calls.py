"""A call of an image task that can't work says at once what the task takes, in whatever way it is made."""

import pytest

from tasks.errors import InvalidArguments
from tasks.images import image_conversion, image_renditions, image_resize
from tests.acceptance.deployment import deployed


@pytest.fixture(autouse=True)
def deployment(server_dir, tmp_path):
    """No worker; nothing is to be written."""
    with deployed(server_dir, tmp_path) as deployment:
        yield deployment


@pytest.mark.parametrize(
    ("task", "args", "options", "said"),
    [
        (image_resize, ("/a.jpg", "/b.png", 800), {}, "too many positional arguments; it takes input, output, width="),
        (image_resize, ("/a.jpg",), {"width": 8}, "missing a required argument: 'output'; it takes input, output, "),
        (image_conversion, ("/a.jpg", "/b.png"), {"width": 8}, "unexpected keyword argument 'width'; it takes input, "),
        (image_renditions, ("/a.jpg", "/b"), {}, "missing a required argument: 'sizes'; it takes input, output_dir, "),
    ],
)
def test_it_names_what_the_task_takes(deployment, task, args, options, said):
    ways = (task.delay, lambda *args, **options: task.apply_async(args, options), task.s(*args[:1]).delay)
    for way, given in zip(ways, (args, args, args[1:]), strict=True):
        with pytest.raises(InvalidArguments) as refused:
            way(*given, **options)
        assert str(refused.value).startswith(f"{task.name}: ")
        assert said in str(refused.value)
    assert deployment.app.store.jobs() == []
