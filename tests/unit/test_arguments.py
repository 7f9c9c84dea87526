"""What a call binds to, and which of it are paths."""

from pathlib import Path
from typing import Any

import pytest

from tasks.arguments import Arguments, InputPath, OutputPath, named
from tasks.errors import InvalidArguments, PathNotAllowed


def resize(input: InputPath, output: OutputPath, *, width: int = 0) -> None: ...  # noqa: A002


def join(output: OutputPath, *inputs: InputPath, **options: Any) -> None: ...


@pytest.fixture
def taken() -> Arguments:
    return Arguments("image_resize", resize)


def test_relative_paths_become_absolute_here_and_nothing_else_does(taken, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    args, kwargs = taken.absolute(["in.jpg"], {"output": Path("out.webp"), "width": 3})

    assert args == [f"{tmp_path}/in.jpg"]
    assert kwargs == {"output": f"{tmp_path}/out.webp", "width": 3}


def test_the_home_directory_is_expanded_and_urls_stay_as_they_are(taken, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))

    args, _ = taken.absolute(["~/in.jpg", "s3://bucket/out.jpg"], {})

    assert args == [f"{tmp_path}/in.jpg", "s3://bucket/out.jpg"]


def label(label: str, input: InputPath) -> None: ...  # noqa: A002


def test_text_that_is_no_path_stays_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    assert Arguments("label", label).absolute(["cat", "a.jpg"], {})[0] == ["cat", f"{tmp_path}/a.jpg"]


def test_the_home_of_nobody_is_refused(taken):
    with pytest.raises(InvalidArguments, match=r"'~no-such-user/in.jpg': .*; give an absolute path"):
        taken.absolute(["~no-such-user/in.jpg", "/out.jpg"], {})


def test_in_a_chain_the_output_comes_first_and_is_a_path_all_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one_path = Arguments("probe", lambda previous, output: None)
    one_path.paths = frozenset({"output"})

    assert one_path.absolute(["out.json"], {})[0] == [f"{tmp_path}/out.json"]


def test_the_result_of_a_job_stands_for_the_file_that_it_wrote(taken):
    bound = taken.bind([{"output": "/a.jpg", "width": 1}, "/b.jpg"], {})

    assert named(bound) == {"input": "/a.jpg", "output": "/b.jpg"}


def test_several_paths_may_be_positional(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    taken = Arguments("join", join)

    args, _ = taken.absolute(["out.mp4", "a.mp4", "b.mp4"], {})
    bound = taken.bind_absolute(args, {"crf": 20})

    assert named(bound) == {
        "output": f"{tmp_path}/out.mp4",
        "inputs": (f"{tmp_path}/a.mp4", f"{tmp_path}/b.mp4"),
        "crf": 20,
    }
    with pytest.raises(PathNotAllowed, match=r"inputs='b\.mp4' is relative"):
        taken.bind_absolute([args[0], args[1], "b.mp4"], {})


@pytest.mark.parametrize("value", [None, 7, "", "a\0b", ["in.jpg"], {"outputs": []}])
def test_what_is_no_path_is_refused_by_its_name(taken, value):
    with pytest.raises(InvalidArguments, match="input is "):
        taken.bind([value, "/out.jpg"], {})


def test_a_result_with_many_outputs_says_to_name_one_of_them(taken):
    with pytest.raises(InvalidArguments, match=r"input is .*; give the path of one of its `outputs`$"):
        taken.bind([{"outputs": [{"output": "/a.jpg"}]}, "/out.jpg"], {})


def test_an_url_is_refused_since_only_local_paths_are_read(taken):
    with pytest.raises(InvalidArguments, match="local paths only"):
        taken.bind(["s3://bucket/in.jpg", "/out.jpg"], {})


@pytest.mark.parametrize(
    ("args", "kwargs"), [([], {}), (["/a"], {}), (["/a", "/b", 1], {}), (["/a", "/b"], {"widht": 1})]
)
def test_missing_and_unknown_arguments_name_what_the_task_takes(taken, args, kwargs):
    with pytest.raises(InvalidArguments, match=r"image_resize: .*; it takes input, output, width"):
        taken.bind(args, kwargs)


def test_a_path_that_is_relative_at_a_worker_is_refused_for_good(taken):
    with pytest.raises(PathNotAllowed, match="a worker stands in another directory"):
        taken.bind_absolute(["in.jpg", "/out.jpg"], {})
