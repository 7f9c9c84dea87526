"""`jobs list | show`: every job on one readable line in any terminal, and all that is known of one."""

import json
import re
from datetime import datetime, timedelta
from types import SimpleNamespace

import pytest

from db.records import Failure, Fence, Status, now
from tasks.cli.jobs import jobs
from tasks.cli.text import clock
from tasks.errors import CorruptMedia
from tests.unit.jobs import change

ID = "8af269fb-e3fe-466a-b147-05f91584394b"
OTHER = "91aaa2bd-2bc0-4c6f-9414-66a341ac416d"
CORRUPT = Failure(
    error_type="CorruptMedia",
    error_module=CorruptMedia.__module__,
    error_message="/data/photos/in.jpg can't be decoded as jpeg; upload it again",
)


@pytest.fixture
def every_status(commands):
    """A job in each status, the newest last."""
    commands.job("0000aaaa-queued")
    commands.claim(running := commands.job("1111bbbb-running"))
    commands.store.progress(running.job_id, 1, percent=40.0)
    commands.claim(completed := commands.job(ID))
    commands.store.complete(completed.job_id, 1, {"output": "/data/out.webp", "width": 800})
    commands.claim(failed := commands.job(OTHER))
    commands.store.end(failed.job_id, Status.FAILED, CORRUPT, fence=Fence(attempt=1))
    cancelled = commands.job("3333cccc-cancelled")
    revoked = Failure(error_type="TaskRevokedError", error_message="x")
    commands.store.end(cancelled.job_id, Status.CANCELLED, revoked, unknown=lambda: cancelled)
    return commands


def lines_of(result):
    assert result.exit_code == 0, result.output
    return result.stdout.rstrip("\n").splitlines()


def test_in_80_columns_each_job_is_one_line_with_its_status_in_full(every_status):
    lines = lines_of(every_status.run(jobs, "list", columns=80))

    assert max(map(len, lines)) <= 80
    assert len(lines) == 2 + 5
    text = "\n".join(lines)
    for status in ("queued", "running 40 %", "completed", "failed", "cancelled"):
        assert len(re.findall(rf"\b{status}\s", text)) == 1, text
    assert text.count("image_resize") == 5
    assert "CorruptMedia: in.jp" in text
    assert "on edge-1" in text


def test_the_id_in_80_columns_is_one_that_show_accepts(every_status):
    listed = [line.split()[0] for line in lines_of(every_status.run(jobs, "list", columns=80))[2:]]

    assert listed[2] == ID[:8]
    for job_id in listed:
        assert lines_of(every_status.run(jobs, "show", job_id))[0].startswith(f"job_id         {job_id}")


def test_ids_that_start_alike_are_shown_as_far_as_they_differ(commands):
    for number in (1, 2):
        commands.job(f"import-2026-photos-000{number}-x")

    listed = [line.split()[0] for line in lines_of(commands.run(jobs, "list", columns=80))[2:]]

    assert listed == ["import-2026-photos-0002", "import-2026-photos-0001"]


def test_in_200_columns_ids_workers_and_reasons_stand_in_full(every_status):
    lines = lines_of(every_status.run(jobs, "list", columns=200))

    assert max(map(len, lines)) <= 200
    failed = next(line for line in lines if OTHER in line)
    assert re.search(r"failed +\d+\.\d\d s +\d\d:\d\d:\d\d +1 +edge-1 ", failed)
    assert failed.rstrip().endswith("CorruptMedia: in.jpg can't be decoded as jpeg; upload it again")


def test_a_pipe_gets_every_job_on_one_whole_line(every_status):
    every_status.job("x" * 200, task_type="a_capability_with_a_very_long_name_indeed")

    lines = lines_of(every_status.run(jobs, "list"))

    assert len(lines) == 1 + 6
    assert lines[1].split()[:2] == ["x" * 200, "a_capability_with_a_very_long_name_indeed"]


def test_a_pipe_gets_of_a_long_reason_its_kind_and_its_remedy_and_json_has_it_all(every_status):
    reason = f"/{'deep/' * 1200}in.jpg can't be decoded as jpeg; upload it again"
    every_status.claim(job := every_status.job("long"))
    every_status.store.end(
        job.job_id, Status.FAILED, Failure(error_type="CorruptMedia", error_message=reason), fence=Fence(attempt=1)
    )

    lines = lines_of(every_status.run(jobs, "list"))
    row = json.loads(lines_of(every_status.run(jobs, "list", "--json"))[0])

    assert max(map(len, lines)) < 400
    assert re.search(r" CorruptMedia: /deep/.*….*/in\.jpg can't be decoded as jpeg; upload it again *$", lines[1])
    assert row["error_message"] == reason


def test_a_long_task_name_gives_way_before_ids_and_statuses_do(every_status):
    every_status.job("4444dddd-long", task_type="a_capability_with_a_very_long_name_indeed_and_more")

    lines = lines_of(every_status.run(jobs, "list", columns=80))

    assert max(map(len, lines)) <= 80
    assert lines[2].startswith("4444dddd  a_capability_")
    assert " queued " in lines[2]


def test_a_retry_says_when_it_is_due_and_after_what(commands):
    job = commands.job(ID)
    commands.claim(job)
    due = now() + timedelta(seconds=30)
    commands.store.requeue(ID, attempt=1, event="retry", retry_count=1, run_after_utc=due, failure=CORRUPT)

    (line,) = lines_of(commands.run(jobs, "list", columns=140))[2:]

    assert line.rstrip().endswith(f"retry 1 after CorruptMedia, due {due.astimezone():%H:%M:%S}")


def test_deaths_of_its_workers_stand_in_the_note_of_a_job(every_status):
    for job_id, deaths in ((ID, 1), (OTHER, 2)):
        change(every_status, SimpleNamespace(id=job_id), deaths=deaths)

    lines = [line.rstrip() for line in lines_of(every_status.run(jobs, "list", columns=200))]

    assert next(line for line in lines if ID in line).endswith(" 1 death")
    assert re.search(r" 2 deaths, CorruptMedia: in\.jpg ", next(line for line in lines if OTHER in line))
    assert "\n".join(lines).count("death") == 2


def test_only_a_time_that_is_still_to_come_is_shown_as_due(commands):
    later = now() + timedelta(hours=1)
    commands.job("aaaa-outbox", is_resting=True)
    commands.job("bbbb-published", run_after_utc=later)
    commands.job("cccc-later", is_resting=True, run_after_utc=later)

    lines = [line.rstrip() for line in lines_of(commands.run(jobs, "list", columns=140))[2:]]

    assert "due" not in lines[1] + lines[2]
    assert " due " in lines[0]


def test_status_task_and_limit_choose_among_the_jobs(every_status):
    every_status.job("5555eeee-other", task_type="image_conversion")

    def ids(*options):
        return [json.loads(line)["job_id"] for line in lines_of(every_status.run(jobs, "list", "--json", *options))]

    assert ids("--status", "failed") == [OTHER]
    assert ids("--task", "image_conversion") == ["5555eeee-other"]
    assert ids("--limit", "2") == ["5555eeee-other", "3333cccc-cancelled"]
    assert ids("--status", "failed", "--task", "image_conversion") == []


def test_json_is_one_object_a_line_with_every_column_and_iso_times(every_status):
    rows = [json.loads(line) for line in lines_of(every_status.run(jobs, "list", "--json", columns=80))]

    completed = next(row for row in rows if row["job_id"] == ID)
    assert completed["status"] == "completed"
    assert completed["parameters"]["width"] == 800
    assert completed["result_data"] == {"output": "/data/out.webp", "width": 800}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?\+00:00", completed["completed_at"])


def test_an_unknown_status_is_answered_with_those_that_exist(commands):
    result = commands.run(jobs, "list", "--status", "done")

    assert result.exit_code == 2
    assert "'done' is no status; choose one of queued, claimed, running, completed, failed, cancelled" in result.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "no jobs yet; submit one: celery -A tasks submit image_resize"),
        (("--status", "failed"), "no failed jobs"),
        (("--task", "image_resize"), "no image_resize jobs"),
    ],
)
def test_where_there_is_no_job_to_list_it_says_so_apart_from_the_output(commands, options, said):
    result = commands.run(jobs, "list", *options)

    assert (result.exit_code, result.stdout) == (0, "")
    assert said in result.stderr


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        (("--task", "image_reszie"), "; did you mean image_resize?"),
        (("--task", "image_reszie", "--json"), "; did you mean image_resize?"),
        (("--task", "xyzzy"), "; known: "),
    ],
)
def test_a_capability_that_nothing_has_the_name_of_is_an_error(commands, options, hint):
    result = commands.run(jobs, "list", *options)

    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"Error: no job of {options[1]}, and no capability has that name{hint}")


def test_a_capability_of_another_installation_is_known_by_its_jobs_and_its_workers(commands):
    commands.job("aaaa", task_type="theirs", queue="theirs")
    commands.worker("edge-1", "served")

    for name in ("theirs", "served"):
        result = commands.run(jobs, "list", "--task", name, "--status", "failed")

        assert result.stderr == f"no failed {name} jobs\n"


def test_show_gives_the_row_and_every_change_in_order(every_status):
    text = "\n".join(lines_of(every_status.run(jobs, "show", OTHER[:4], columns=80)))

    assert f"job_id         {OTHER}" in text
    assert "status         failed" in text
    assert 'parameters     {"input": "/data/photos/in.jpg", "output": "/data/out.webp", "width": 800}' in text
    changes = text.split("\nchanges\n")[1].splitlines()
    assert [line.split()[0] for line in changes] == ["1", "2", "3", "4"]
    assert [line.split()[3] for line in changes] == ["created", "claimed", "started", "failed"]
    assert changes[3].endswith("edge-1  CorruptMedia: /data/photos/in.jpg can't be decoded as jpeg; upload it again")


def test_show_json_is_the_row_with_its_logs(every_status):
    document = json.loads(every_status.run(jobs, "show", ID, "--json").stdout)

    assert document["job_id"] == ID
    assert [log["event_type"] for log in document["logs"]] == ["created", "claimed", "started", "completed"]


def test_the_traceback_of_a_bug_stands_under_its_change(commands):
    commands.claim(job := commands.job(ID))
    details = {"traceback": 'Traceback (most recent call last):\n  File "x.py", line 1\nKeyError: 5\n'}
    bug = Failure(error_type="KeyError", error_message="5", details=details)
    commands.store.end(job.job_id, Status.FAILED, bug, fence=Fence(attempt=1))

    assert lines_of(commands.run(jobs, "show", ID))[-3:] == [
        "        Traceback (most recent call last):",
        '          File "x.py", line 1',
        "        KeyError: 5",
    ]


@pytest.mark.parametrize("typed", ["ABCD1234", "Abcd"])
def test_an_id_may_be_typed_in_capitals(commands, typed):
    commands.job("abcd1234")

    assert "abcd1234" in commands.run(jobs, "show", typed).stdout


@pytest.mark.parametrize(
    ("job_id", "said"),
    [
        ("nope", "no job's id starts with 'nope'; celery -A tasks jobs list shows them"),
        ("", "no job's id starts with ''"),
        ("%", "no job's id starts with '%'"),
        ("same-", "several ids start with 'same-': same-2, same-1"),
    ],
)
def test_an_id_that_is_unknown_or_not_unique_is_said_in_one_line(commands, job_id, said):
    commands.job("same-1")
    commands.job("same-2")

    result = commands.run(jobs, "show", job_id)

    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {said}")
    assert result.stderr.count("\n") == 1


def test_what_a_file_name_holds_cannot_steer_the_terminal_nor_pass_for_markup(commands):
    job = commands.job(ID, parameters={"input": "/data/in.jpg"})
    commands.claim(job)
    nasty = Failure(error_type="CorruptMedia", error_message="[red]a\nb\x1b[2J\udcff.jpg[/] can't be decoded")
    commands.store.end(job.job_id, Status.FAILED, nasty, fence=Fence(attempt=1))

    listed = lines_of(commands.run(jobs, "list"))
    shown = commands.run(jobs, "show", ID).stdout

    assert len(listed) == 2
    for text in ("\n".join(listed), shown):
        assert r"CorruptMedia: [red]a\nb\x1b[2J\udcff.jpg[/] can't be decoded" in text
        assert "\x1b" not in text


def test_a_time_of_another_day_has_its_date():
    today = datetime.now().astimezone()
    before = today - timedelta(days=2)

    assert (clock(today), clock(before)) == (f"{today:%H:%M:%S}", f"{before:%m-%d %H:%M}")
