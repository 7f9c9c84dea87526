"""Temp files of attempts that were killed."""

import pytest

from tasks.leftovers import remove_temp_files, remove_temp_files_of_row, token_of


@pytest.fixture
def task(producer):
    return producer.task.image_resize


@pytest.fixture
def row(tmp_path):
    return {
        "job_id": "job-1",
        "attempt": 2,
        "task_type": "image_resize",
        "parameters": {"input": str(tmp_path / "in" / "a.jpg"), "output": str(tmp_path / "out.webp"), "width": 9},
    }


MINE = token_of("job-1", 2)


def temp_file(directory, token=MINE):
    directory.mkdir(exist_ok=True)
    path = directory / f".media-tasks-{token}-1234.part"
    path.touch()
    return path


def test_the_temp_files_up_to_an_attempt_are_removed_and_none_of_a_later_one(producer, row, tmp_path):
    over = [temp_file(tmp_path, token_of("job-1", attempt)) for attempt in (1, 2)]
    later = [temp_file(tmp_path, token_of("job-1", attempt)) for attempt in (3, 12, 20)]

    assert remove_temp_files_of_row(producer.app, row) == 2
    assert [path.exists() for path in (*over, *later)] == [False] * 2 + [True] * 3


def test_those_of_a_call_are_removed_and_of_no_other_job(task, row, tmp_path):
    mine = [temp_file(tmp_path, token_of("job-1", attempt)) for attempt in (2, 13)]
    other = temp_file(tmp_path, token_of("job-1.2", 2))
    called_with = ([row["parameters"]["input"], row["parameters"]["output"]], {"width": 9})

    assert remove_temp_files(task, called_with, "job-1", up_to=13) == 2
    assert [path.exists() for path in (*mine, other)] == [False, False, True]


def test_an_output_that_is_a_directory_is_looked_into(producer, row, tmp_path):
    inside = temp_file(tmp_path / "renditions")
    row["parameters"]["output"] = str(tmp_path / "renditions")

    assert remove_temp_files_of_row(producer.app, row) == 1
    assert not inside.exists()


def test_the_directory_of_an_input_is_left_alone(producer, row, tmp_path):
    beside_input = temp_file(tmp_path / "in")

    assert remove_temp_files_of_row(producer.app, row) == 0
    assert beside_input.exists()


def test_only_temp_files_of_ours_are_removed(producer, row, tmp_path):
    others = [tmp_path / name for name in ("out.webp", f"{MINE}.part", f".media-tasks-{MINE}-x.webp")]
    for path in others:
        path.touch()

    assert remove_temp_files_of_row(producer.app, row) == 0
    assert all(path.exists() for path in others)


def test_an_id_that_could_be_a_pattern_is_none(task, row, tmp_path):
    other = temp_file(tmp_path, token_of("job-1", 2))
    called_with = ([row["parameters"]["input"], row["parameters"]["output"]], {"width": 9})

    assert remove_temp_files(task, called_with, "job-*", up_to=2) == 0
    assert remove_temp_files(task, called_with, "job-[0-9]", up_to=2) == 0
    assert other.exists()


@pytest.mark.parametrize(
    "output", ["relative/out.webp", "s3://bucket/out.webp", "/no/such/directory/out.webp", 7, None]
)
def test_an_output_that_is_no_local_path_has_no_temp_files(producer, row, output):
    row["parameters"]["output"] = output

    assert remove_temp_files_of_row(producer.app, row) == 0


def test_a_job_of_a_task_that_is_not_known_here_is_left_alone(producer, row, tmp_path):
    path = temp_file(tmp_path)

    assert remove_temp_files_of_row(producer.app, row | {"task_type": "unknown"}) == 0
    assert path.exists()
