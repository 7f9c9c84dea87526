"""Bad input, as its submitter sees it: failed at once, with a reason that helps, and nothing else is disturbed."""

import os
import subprocess
import sys
import zlib

import pytest
import pyvips

from tasks.errors import InvalidArguments, MediaTasksError, PathNotAllowed, PermanentError, UnknownQueue, UnknownTask
from tests.acceptance.conftest import DEPLOYMENT
from tests.acceptance.deployment import deployed
from tests.media.conftest import gif, png

FAILED = ["created", "claimed", "started", "failed"]
GET = {"timeout": 20}


@pytest.fixture(scope="module")
def deployment(request, module_server_dir, tmp_path_factory):
    """As for all modules, and with a worker that has roots, unlike the producer: outside nothing is read or written."""
    roots = os.pathsep.join([str(tmp_path_factory.getbasetemp()), "/dev"])
    with deployed(module_server_dir, tmp_path_factory.mktemp("deployment")) as deployment:
        request.node.stash[DEPLOYMENT] = deployment
        deployment.start_worker("--concurrency=1", env={"MEDIA_ROOTS": roots})
        yield deployment


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "good.jpg"
    (pyvips.Image.perlin(600, 400) * 100 + 128).cast("uchar").jpegsave(str(path))
    return path


@pytest.fixture
def assert_refused(deployment, good, tmp_path):
    """Submit a job that must fail, with a neighbour before and behind it; returns its row."""

    def run(input, output=None, *words, task="image_resize", error, **arguments):  # noqa: A002 (the public argument)
        output = output or tmp_path / "out" / "out.webp"
        arguments = arguments or ({"width": 100} if task == "image_resize" else {})
        task_of = deployment.task.__getattr__
        before = task_of("image_resize").delay(good, tmp_path / "neighbours" / "before.png", width=20)
        job = task_of(task).delay(input, output, **arguments)
        behind = task_of("image_resize").delay(good, tmp_path / "neighbours" / "behind.png", width=20)
        pids = deployment.workers[0].child_pids()

        row = deployment.wait_for(job, "failed", "completed")

        assert (row["status"], row["error_type"]) == ("failed", error)
        assert [word for word in words or [str(input)] if word not in row["error_message"]] == []
        assert str(input) in row["error_message"] or str(output) in row["error_message"]
        assert "\n" not in row["error_message"]
        assert (row["retry_count"], row["deaths"], row["publication"]) == (0, 0, 1)
        assert deployment.events(job) == FAILED
        with pytest.raises(PermanentError) as caught:
            job.get(**GET)
        assert type(caught.value).__name__ == error
        for neighbour in (before, behind):
            assert neighbour.get(**GET)["width"] == 20
        assert deployment.workers[0].child_pids() == pids, "no process died"
        assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []
        return row

    return run


def test_a_missing_file_fails_its_job(assert_refused, tmp_path):
    assert_refused(tmp_path / "none.jpg", None, "does not exist", error="InputMissing")


def test_a_directory_fails_its_job(assert_refused, tmp_path):
    (tmp_path / "folder").mkdir()
    assert_refused(tmp_path / "folder", None, "is a directory", error="InputMissing")


def test_an_empty_file_fails_its_job(assert_refused, tmp_path):
    (tmp_path / "empty.jpg").touch()
    assert_refused(tmp_path / "empty.jpg", None, "is empty", error="InputMissing")


def test_text_with_the_suffix_of_an_image_fails_its_job(assert_refused, tmp_path):
    (tmp_path / "text.jpg").write_text("This is no picture.\n" * 100)
    assert_refused(tmp_path / "text.jpg", None, "not an image", error="UnsupportedMedia")


def test_a_truncated_jpeg_fails_its_job(assert_refused, tmp_path, good):
    (tmp_path / "cut.jpg").write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    assert_refused(tmp_path / "cut.jpg", None, "upload it again", error="CorruptMedia")


@pytest.fixture(scope="module")
def bomb(tmp_path_factory):
    rows = zlib.compressobj(9)
    pixels = b"".join(rows.compress(bytes(8193 * 256)) for _ in range(256)) + rows.flush()
    path = tmp_path_factory.mktemp("bomb") / "bomb.png"
    path.write_bytes(png(65_536, 65_536, bits=1, pixels=pixels))
    return path


@pytest.mark.parametrize("task", ["image_resize", "image_conversion"])
def test_a_png_bomb_fails_its_job(assert_refused, bomb, task):
    assert_refused(bomb, None, "65,536 x 65,536 px", "150 Mpx", "MAX_PIXELS", task=task, error="LimitExceeded")


def test_a_png_bomb_for_renditions_fails_its_job(assert_refused, bomb, tmp_path):
    words = ("65,536 x 65,536 px", "MAX_PIXELS")
    assert_refused(bomb, tmp_path / "out", *words, task="image_renditions", error="LimitExceeded", sizes=[100])


def test_a_bomb_costs_the_worker_less_than_a_fifth_of_a_second_of_cpu(deployment, assert_refused, bomb, good, tmp_path):
    deployment.task.image_resize.delay(good, tmp_path / "warm.png", width=10).get(**GET)
    (child,) = deployment.workers[0].child_pids()
    before = cpu_s(child)

    jobs = [deployment.task.image_resize.delay(bomb, tmp_path / f"{n}.png", width=10) for n in range(5)]
    for job in jobs:
        deployment.wait_for(job, "failed")

    assert (cpu_s(child) - before) / len(jobs) < 0.2


def cpu_s(pid):
    """User and system time of a process so far."""
    if sys.platform != "linux":
        pytest.skip("the CPU time of another process is read from /proc")
    with open(f"/proc/{pid}/stat") as stat:  # noqa: PTH123
        user, system = stat.read().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def test_a_gif_of_100_000_frames_fails_its_job(assert_refused, tmp_path):
    (tmp_path / "long.gif").write_bytes(gif(100_000))
    assert_refused(tmp_path / "long.gif", None, "MAX_FRAMES", error="LimitExceeded")


def test_an_svg_with_external_references_fails_its_job(assert_refused, tmp_path):
    (tmp_path / "in.svg").write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><image href="file:///etc/passwd"/></svg>'
    )
    assert_refused(tmp_path / "in.svg", None, "svg", error="UnsupportedMedia")


def test_an_output_directory_that_may_not_be_written_fails_its_job(assert_refused, good, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    is_root = os.geteuid() == 0  # whom permissions don't stop, but a device is no directory for anybody
    directory = "/dev/null" if is_root else str(tmp_path / "locked")
    assert_refused(good, f"{directory}/out.webp", directory, error="OutputNotWritable")


def test_an_output_that_is_a_directory_fails_its_job(assert_refused, good, tmp_path):
    (tmp_path / "taken.webp").mkdir()
    assert_refused(good, tmp_path / "taken.webp", str(tmp_path / "taken.webp"), error="OutputNotWritable")


def test_an_input_outside_of_the_roots_fails_its_job(assert_refused):
    assert_refused("/etc/hostname", None, "MEDIA_ROOTS", error="PathNotAllowed")


def test_an_output_outside_of_the_roots_fails_its_job(assert_refused, good):
    assert_refused(good, "/var/out.webp", "/var/out.webp", "MEDIA_ROOTS", error="PathNotAllowed")


def test_a_link_that_leads_out_of_the_roots_fails_its_job(assert_refused, tmp_path):
    (tmp_path / "link.jpg").symlink_to("/etc/hostname")
    assert_refused(tmp_path / "link.jpg", None, "MEDIA_ROOTS", error="PathNotAllowed")


def test_an_output_that_is_the_input_under_another_name_fails_its_job(assert_refused, good, tmp_path):
    (tmp_path / "copy.jpg").write_bytes(good.read_bytes())
    (tmp_path / "same.jpg").symlink_to(tmp_path / "copy.jpg")
    assert_refused(tmp_path / "copy.jpg", tmp_path / "same.jpg", error="PathNotAllowed")
    assert (tmp_path / "copy.jpg").read_bytes() == good.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"width": 0}, ["width"]),
        ({"width": -1}, ["width"]),
        ({"width": 10**9}, ["width"]),
        ({"height": 10**9, "width": 10}, ["height"]),
        ({"width": "wide"}, ["width"]),
        ({}, ["width", "height"]),
        ({"width": 10, "fit": "squeeze"}, ["fit", "squeeze", "inside", "cover"]),
        ({"width": 10, "fit": "fill", "preserve_aspect": True}, ["preserve_aspect", "fit"]),
        ({"width": 10, "quality": 101}, ["quality"]),
        ({"width": 10, "colour": "red"}, ["colour"]),
    ],
    ids=str,
)
def test_arguments_that_cannot_work_are_an_error_at_the_call(deployment, good, tmp_path, arguments, words):
    before = len(deployment.app.store.jobs(limit=10_000))

    with pytest.raises((InvalidArguments, TypeError)) as caught:
        deployment.task.image_resize.delay(good, tmp_path / "out.png", **arguments)

    assert [word for word in words if word not in str(caught.value)] == []
    assert len(deployment.app.store.jobs(limit=10_000)) == before


def test_an_unknown_suffix_is_an_error_at_the_call(deployment, good, tmp_path):
    with pytest.raises(MediaTasksError, match=r"xyz.*(png|webp)"):
        deployment.task.image_resize.delay(good, tmp_path / "out.xyz", width=10)


def test_an_output_equal_to_the_input_is_an_error_at_the_call(deployment, good):
    with pytest.raises(PathNotAllowed, match="is the input itself"):
        deployment.task.image_resize.delay(good, good, width=10)


def test_an_unknown_task_is_an_error_at_the_call_that_names_the_nearest(deployment):
    with pytest.raises(UnknownTask, match=r"no worker serves image_reszie; did you mean image_resize\?"):
        deployment.app.send_task("image_reszie", ("in.jpg", "out.jpg"), {"width": 10})


def test_a_queue_that_nobody_serves_is_an_error_at_the_call_that_names_the_nearest(deployment, good, tmp_path):
    with pytest.raises(UnknownQueue, match=r"image_reszie; did you mean image_resize\?"):
        deployment.task.image_resize.apply_async((good, tmp_path / "out.png"), {"width": 10}, queue="image_reszie")


def test_a_task_that_does_not_exist_cannot_be_imported():
    with pytest.raises(ImportError, match="image_reszie"):
        from tasks import image_reszie  # noqa: F401


def test_no_temp_file_is_left_by_any_of_this(deployment, good, tmp_path):
    """A temp file is named after its attempt, and so after its job."""
    ids = [row["job_id"] for row in deployment.app.store.jobs(limit=10_000)]
    assert len(ids) > 40

    assert [p for p in tmp_path.parent.rglob("*") if any(job_id in p.name for job_id in ids)] == []


def test_a_producer_validates_without_a_media_engine(deployment):
    code = (
        "import sys; from tasks import image_resize\n"
        "try: image_resize.delay('a.jpg', 'b.xyz', width=-1)\n"
        "except ValueError as exc: print(type(exc).__name__, sorted({'pyvips', 'PIL', 'numpy'} & set(sys.modules)))"
    )
    env = {**os.environ, **{name: str(value) for name, value in deployment.env.items()}}

    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)

    assert done.stdout == "InvalidArguments []\n", done.stderr
