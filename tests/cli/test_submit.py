"""`submit`: the options of a capability's declaration; a job that runs, or one clear line that says why not."""

import json
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import click
import pytest
from click.testing import CliRunner
from PIL import Image

from tasks.cli import submit
from tests.tooling.waiting import eventually

Path = Annotated[str, "path"]


def test_wait_shows_the_way_and_prints_the_result(celery, run_worker, photo, tmp_path):
    run_worker("-Q", "image_resize", "--concurrency=1")

    done = celery("submit", "image_resize", "photo.jpg", "small.webp", "--width", 80, "--wait", "--timeout", 30)

    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["output"], result["width"], result["height"]) == (str(tmp_path / "small.webp"), 80, 60)
    with Image.open(tmp_path / "small.webp") as image:
        assert image.size == (80, 60)
    assert "image_resize completed" in done.stderr
    assert "100%" in done.stderr


def test_wait_fails_with_the_error_of_the_job(celery, run_worker, broken, tmp_path):
    run_worker("-Q", "image_resize", "--concurrency=1")

    done = celery("submit", "image_resize", broken, "out.webp", "--width", 80, "--wait", "--timeout", 30)

    assert (done.returncode, done.stdout) == (1, "")
    assert " failed: UnsupportedMedia: " in done.error
    assert str(broken) in done.error
    assert not (tmp_path / "out.webp").exists()


def test_without_a_worker_the_job_is_queued_and_a_remark_says_who_is_missing(celery, photo, tmp_path):
    done = celery("submit", "image_resize", "photo.jpg", "out.webp", "--width", 80, "--priority", 9)

    assert done.returncode == 0
    (row,) = map(json.loads, celery("jobs", "list", "--json").stdout.splitlines())
    assert done.stdout == f"{row['job_id']}\n"
    remark = "queued; no live worker serves image_resize: celery -A tasks worker -Q image_resize\n"
    assert done.stderr == remark
    assert (row["status"], row["priority"]) == ("queued", 9)
    assert row["parameters"] == {"input": str(photo), "output": str(tmp_path / "out.webp"), "width": 80}


@pytest.mark.parametrize("timeout", ["nan", "0", "-1"])
def test_a_timeout_that_is_no_time_is_refused(celery, photo, timeout):
    done = celery("submit", "image_resize", photo, "out.webp", "--width", 80, "--wait", "--timeout", timeout)

    assert done.returncode == 2
    assert "--timeout" in done.stderr
    assert celery("jobs", "list", "--json").stdout == ""


def test_the_end_of_the_timeout_says_how_to_go_on_watching(celery, photo):
    done = celery("submit", "image_resize", photo, "out.webp", "--width", 80, "--wait", "--timeout", 0.2)

    assert done.returncode == 1
    assert "has not ended within 0.2 s and goes on: celery -A tasks jobs show " in done.error


def test_an_unknown_capability_is_answered_with_the_nearest(celery, photo):
    done = celery("submit", "image_reszie", photo, "out.webp")

    assert done.returncode == 1
    assert done.error == "Error: no capability is called image_reszie; did you mean image_resize?"
    assert done.stderr.count("\n") == 1


def test_a_strategy_of_a_misspelt_queue_is_refused_in_one_line(celery, photo):
    done = celery("submit", "image_resize", photo, "out.webp", env={"QUEUE_STRATEGY": "image_reszie=LIFO"})

    assert done.returncode == 1
    assert done.stderr == "Error: QUEUE_STRATEGY: no queue is called image_reszie; did you mean image_resize?\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["image_resize", "in.jpg"], "Missing argument 'OUTPUT'"),
        (["image_resize", "in.jpg", "out.webp"], "neither width nor height is given"),
        (["image_resize", "in.jpg", "out.webp", "--width", "0"], "width is 0; give a whole number from 1"),
        (["image_resize", "in.jpg", "out.webp", "--width=-1"], "width is -1"),
        (["image_resize", "in.jpg", "out.webp", "--width", "wide"], "'wide' is not a valid integer"),
        (["image_resize", "in.jpg", "out.webp", "--width", "80", "--fit", "covr"], "did you mean cover?"),
        (["image_resize", "in.jpg", "out.webp", "--widht", "80"], "No such option '--widht'"),
        (["image_resize", "in.jpg", "out.xyz", "--width", "80"], "the suffix .xyz can't be written"),
        (["image_resize", "in.jpg", "in.jpg", "--width", "80"], "is the input itself"),
        (
            ["image_resize", "in.jpg", "out.webp", "--width", "80", "--priority", "11"],
            "11 is not in the range 1<=x<=10",
        ),
        (["image_resize", "in.jpg", "out.webp", "--width", "80", "--priority", "x"], "'x' is not a valid integer."),
        (["image_resize", "in.jpg", "out.webp", "--width", "80", "--timeout", "x"], "'x' is not a valid number."),
        (["image_renditions", "in.jpg", "out", "--sizes", "400,big"], "sizes holds 'big'; a width, or a box"),
        (["image_renditions", "in.jpg", "out", "--sizes", "0"], "sizes holds 0; a width, or a box"),
        (["image_renditions", "in.jpg", "out"], "Missing option '--sizes'"),
    ],
)
def test_bad_arguments_end_in_one_clear_line_and_no_job(commands, arguments, said):
    result = commands.run(submit.submit, *arguments)

    assert result.exit_code in (1, 2)
    assert result.stderr.strip().splitlines()[-1].startswith("Error: ")
    assert said in result.stderr.strip().splitlines()[-1]
    assert commands.store.jobs() == []


def test_help_shows_every_option_of_the_declaration_with_its_default(commands):
    text = " ".join(commands.run(submit.submit, "image_resize", "--help").stdout.split())

    assert "image_resize [OPTIONS] INPUT OUTPUT" in text
    assert "Resize an image into a box of `width` x `height` px" in text
    assert "--width INTEGER Width of the box, px." in text
    assert "--enlarge / --no-enlarge Also make small images larger. [default: false]" in text
    assert "--quality INTEGER 1-100, for lossy formats. [default: 85]" in text
    assert "--wait " in text
    assert "--priority " in text
    assert "Args:" not in text


def test_the_list_of_capabilities_fits_into_80_columns(commands):
    lines = commands.run(submit.submit, "--help", columns=80).stdout.splitlines()

    assert max(map(len, lines)) <= 80
    for name in ("image_conversion", "image_renditions", "image_resize"):
        assert any(line.startswith(f"  {name}  ") for line in lines)


# The options of any declaration


@pytest.fixture
def submitted(commands, monkeypatch):
    """`submitted(function, *arguments)`: what the command of a capability with this declaration would submit."""

    def run(function: Any, *arguments: str) -> Any:
        task = commands.app.task(function, bind=False, shared=False, name=f"x_{function.__name__}")
        sent: list[Any] = []

        def apply_async(args, kwargs, priority):
            sent.append(((*args, kwargs), priority))
            return SimpleNamespace(id="some-id")

        monkeypatch.setattr(task, "apply_async", apply_async)
        monkeypatch.setattr(submit, "_why_it_waits", lambda _task: "")
        context = SimpleNamespace(app=commands.app, no_color=False)
        result = CliRunner().invoke(submit._command_of(task), arguments, obj=context)
        return sent[0] if result.exit_code == 0 and sent else result

    return run


def test_each_type_of_a_declaration_is_read_as_what_it_is(submitted):
    def job(
        source: Path,
        output: Path,
        frames: int = 1,
        *,
        rate: float | None = None,
        mode: Literal["fast", "best"] = "fast",
        at: int | str = 0,
        widths: Sequence[int] = (),
        boxes: Sequence[int | str] = (),
        labels: list[str] | None = None,
        tags: Mapping[str, Any] | None = None,
        loop: bool = True,
        title: str = "",
    ) -> None: ...

    numbers = ("--rate", "2.5", "--widths", "400,800", "--boxes", "400,1600x900", "--priority", "3")
    texts = ("--mode", "best", "--at", "00:01", "--labels", "1,b", "--tags", '{"a": 1}', "--no-loop")
    (arguments,), priority = submitted(job, "in", "out", "7", *numbers, *texts)

    assert arguments == {
        "source": "in", "output": "out", "frames": 7, "rate": 2.5, "mode": "best", "at": "00:01", "widths": [400, 800],
        "boxes": [400, "1600x900"], "labels": ["1", "b"], "tags": {"a": 1}, "loop": False,
    }  # fmt: skip
    assert priority == 3
    assert submitted(job, "in", "out", "--at", "12")[0][0]["at"] == 12


def test_any_number_of_arguments_is_handed_over_in_order(submitted):
    def job(target: Path, *numbers: int, scale: float = 1.0) -> None: ...

    assert submitted(job, "out", "3", "5", "--scale", "2")[0] == ("out", 3, 5, {"scale": 2.0})
    assert submitted(job, "out")[0] == ("out", {})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--mode", "slow"], "'slow' is not one of 'fast', 'best'"),
        (["--widths", "400,x"], "'x' is not a valid integer"),
        (["--tags", "[1]"], "'[1]' is no JSON object"),
    ],
)
def test_what_does_not_fit_its_type_is_refused(submitted, options, said):
    def job(
        source: Path,
        *,
        mode: Literal["fast", "best"] = "fast",
        widths: Sequence[int] = (),
        tags: dict[str, Any] | None = None,
    ) -> None: ...

    result = submitted(job, "in", *options)

    assert result.exit_code == 2
    assert said in result.stderr


def test_an_argument_named_as_an_option_of_submit_keeps_its_name(submitted):
    def job(source: Path, *, timeout: int = 10, priority: str = "speed") -> None: ...

    sent = submitted(job, "in", "--timeout", "3", "--priority", "size", "--job-priority", "8")

    assert sent == (({"source": "in", "timeout": 3, "priority": "size"},), 8)


def test_a_description_of_several_lines_is_shown_whole(submitted):
    def job(source: Path, *, crop: str = "none") -> None:
        """Cut.

        Args:
            source: The image.
            crop: Where to cut: at the centre,
                or where there is most to see.

        Returns:
            Nothing: it is a test.
        """

    text = " ".join(submitted(job, "--help").stdout.split())

    assert "--crop TEXT Where to cut: at the centre, or where there is most to see. [default: none]" in text
    assert "Returns" not in text


def test_a_result_is_readable_json_that_can_not_steer_the_terminal():
    value = {"output": "/Fotos/für Zoë 写真 🦔.webp", "odd": "a\n\x1b\x9b\u202e\udcff\U000e0001"}

    shown = submit._as_json(value)

    assert "/Fotos/für Zoë 写真 🦔.webp" in shown
    assert all(c.isprintable() or c == "\n" for c in shown)
    assert json.loads(shown) == value


def test_ctrl_c_while_waiting_leaves_the_job_and_says_so(commands, monkeypatch):
    def interrupt(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(submit, "_followed", interrupt)
    task = SimpleNamespace(app=commands.app, name="image_resize")
    with pytest.raises(click.ClickException, match=r"no longer waiting; some-id goes on: celery -A tasks jobs show"):
        submit._wait(task, SimpleNamespace(id="some-id"), None)


NO_WORKER = "no live worker serves image_resize: celery -A tasks worker -Q image_resize"


def test_who_waits_in_a_pipe_is_told_at_once_and_once_that_no_worker_serves_the_job(celery, photo):
    arguments = ("submit", "image_resize", photo, "out.webp", "--width", 80, "--wait", "--timeout")

    for timeout_s in (0.2, submit.LOOK_EVERY_S + 0.5):
        lines = celery(*arguments, timeout_s).stderr.splitlines()

        assert lines[0] == f"queued; {NO_WORKER}"
        assert lines.count(lines[0]) == 1
        assert lines[1].startswith(f"image_resize queued; {NO_WORKER} ")


def test_who_waits_in_a_terminal_is_told_beside_the_bar(celery, photo):
    shown = {"TTY_COMPATIBLE": 1, "COLUMNS": 200}

    done = celery("submit", "image_resize", photo, "out.webp", "--width", 80, "--wait", "--timeout", 0.5, env=shown)

    assert f"image_resize queued; {NO_WORKER}" in done.stderr
    assert f"\nqueued; {NO_WORKER}" not in done.stderr


@pytest.mark.parametrize("setting", ["ENQUEUE=broker", "MIRROR=off"])
def test_a_wait_that_has_no_row_to_look_at_names_the_setting(celery, photo, setting):
    env = dict([setting.split("=")])

    done = celery("submit", "image_resize", photo, "out.webp", "--width", 80, "--wait", env=env)

    assert done.returncode == 1
    assert done.error.endswith(f" is submitted; with {setting} nobody here can wait for it")


@pytest.mark.parametrize("waits", [(), ("--wait", "--timeout", "0.2")])
def test_a_paused_queue_is_said_at_once(celery, photo, waits):
    celery("queues", "pause", "image_resize", "--reason", "new disk")

    done = celery("submit", "image_resize", photo, "out.webp", "--width", 80, *waits)

    said = f"queued; {NO_WORKER}; it is paused (new disk): celery -A tasks queues resume image_resize"
    assert done.stderr.splitlines()[0] == said


def test_a_result_that_is_no_json_is_printed_with_its_type(commands, monkeypatch, capsys):
    commands.claim(job := commands.job("some-id"))
    commands.store.complete(job.job_id, 1, None)
    monkeypatch.setattr(submit, "_followed", lambda *_: {"digest": b"\xff\0"})
    task = SimpleNamespace(app=commands.app, name="image_resize")

    submit._wait(task, SimpleNamespace(id="some-id"), None)

    assert json.loads(capsys.readouterr().out) == {"digest": {"__type__": "base64", "__value__": "/wA="}}


def test_a_job_submitted_before_its_worker_starts_is_done_when_it_comes(celery, run_worker, photo, tmp_path):
    celery("submit", "image_conversion", photo, "out.png")

    run_worker("--concurrency=1")

    eventually((tmp_path / "out.png").exists, 30)
