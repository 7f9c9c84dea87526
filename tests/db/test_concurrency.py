"""Many real processes and threads on one database: nothing is lost, done twice, or refused."""

import threading
from collections import Counter

from db.records import Decision, Failure, Fence, Heartbeat, Liveness, Status, now
from tests.db.conftest import claim, events_of, new_job, row_of, running
from tests.db.processes import in_processes

PROCESSES = 6
JOBS = 40


def test_each_job_is_claimed_by_exactly_one_of_many_processes(store):
    jobs = [new_job() for _ in range(JOBS)]
    for job in jobs:
        store.enqueue(job)

    def claim_all(number):
        return [job.job_id for job in jobs if claim(store, job, f"worker-{number}").attempt]

    claimed = Counter(job_id for ids in in_processes(PROCESSES, claim_all) for job_id in ids)

    assert claimed == Counter(job.job_id for job in jobs)
    for job in jobs:
        assert events_of(store, job) == ["created", "claimed", "started"]


def test_of_many_redeliveries_each_takes_over_from_the_one_before(store):
    job, _attempt = running(store)

    def take_over(number):
        claimed = claim(store, job, f"worker-{number}", liveness=Liveness.DEAD, max_deaths=1000)
        return claimed.attempt if claimed.decision is Decision.RUN else None

    attempts = [attempt for attempt in in_processes(PROCESSES, take_over) if attempt]

    # One that lost the race between its look and its update finds the job held; it never shares an attempt.
    assert attempts
    assert sorted(attempts) == list(range(3, 3 + 2 * len(attempts), 2))
    row = row_of(store, job)
    assert (row["attempt"], row["deaths"]) == (1 + 2 * len(attempts), len(attempts))
    assert events_of(store, job) == ["created", "claimed", "started"] + ["lost", "claimed", "started"] * len(attempts)


def test_no_update_is_lost_between_processes(store):
    job, attempt = running(store)
    rounds = 25

    def retry_and_claim(number):
        done = 0
        while done < rounds:
            row = row_of(store, job)
            publication = store.requeue(
                job.job_id, attempt=row["attempt"], event="retry", retry_count=row["retry_count"] + 1
            )
            if publication is not None:
                claimed = claim(store, job, f"worker-{number}", publication=publication.number)
                assert claimed.decision is Decision.RUN
                done += 1

    in_processes(4, retry_and_claim)

    row = row_of(store, job)
    assert (row["retry_count"], row["publication"]) == (4 * rounds, 1 + 4 * rounds)
    assert row["attempt"] == attempt + 4 * rounds
    assert len(events_of(store, job)) == 3 + 3 * 4 * rounds


def test_many_jobs_live_a_whole_life_at_once_without_an_error(store):
    """Every write that a job sees, in every process at the same time: no error reaches a caller."""

    def live(number):
        for index in range(JOBS):
            job = new_job(f"life-{number}-{index}", group_id=f"group-{index}", in_chord=True)
            assert store.enqueue(job)
            attempt = claim(store, job, f"worker-{number}").attempt
            assert store.progress(job.job_id, attempt, percent=50.0)
            store.heartbeat(heartbeat_of(f"worker-{number}"))
            if index % 4:
                assert store.complete(job.job_id, attempt, {"index": index})
            else:
                assert store.end(
                    job.job_id, Status.FAILED, Failure(error_type="E", error_message="m"), fence=Fence(attempt=attempt)
                )
            store.chord_parts(f"group-{index}", PROCESSES)

    in_processes(PROCESSES, live)

    assert store.counts() == {"image_resize": {"completed": PROCESSES * JOBS * 3 // 4, "failed": PROCESSES * JOBS // 4}}


def test_an_attempt_is_closed_once_by_many_processes(store):
    job, attempt = running(store)

    closed = in_processes(PROCESSES, lambda _number: store.close(job.job_id, attempt, reason="its worker died"))

    assert len([one for one in closed if one is not None]) == 1
    assert (row_of(store, job)["deaths"], row_of(store, job)["publication"]) == (1, 2)
    assert events_of(store, job) == ["created", "claimed", "started", "lost"]


def test_a_job_of_a_dead_worker_is_closed_or_taken_over_but_never_both(store):
    """The reconciler and a guard find the same dead attempt at the same moment."""
    jobs = [running(store) for _ in range(JOBS)]

    def dead_worker_1(holder):
        return Liveness.DEAD if holder.worker_id == "worker-1" else Liveness.ALIVE

    def rescue(number):
        if number % 2:
            return [store.close(job.job_id, attempt, reason="dead") is not None for job, attempt in jobs]
        claims = [claim(store, job, f"guard-{number}", judge=dead_worker_1) for job, _attempt in jobs]
        return [claimed.decision is Decision.RUN for claimed in claims]

    done = in_processes(PROCESSES, rescue)

    for (job, _attempt), rescued in zip(jobs, zip(*done, strict=True), strict=True):
        assert sum(rescued) == 1
        row = row_of(store, job)
        assert (row["deaths"], row["attempt"]) == (1, 3 if row["status"] == "running" else 2)
        assert events_of(store, job).count("lost") == 1


def test_a_job_is_enqueued_once_by_many_processes(store):
    job = new_job()

    made = in_processes(PROCESSES, lambda _number: store.enqueue(job) is not None)

    assert sorted(made) == [False] * (PROCESSES - 1) + [True]
    assert events_of(store, job) == ["created"]


def test_messages_without_a_row_make_one_row(store):
    job = new_job()

    claims = in_processes(PROCESSES, lambda number: claim(store, job, f"worker-{number}"))

    assert row_of(store, job)["attempt"] == max(claimed.attempt for claimed in claims)
    assert events_of(store, job).count("created") == 1


def test_exactly_one_process_publishes_the_body_of_a_chord(store):
    rounds = 8
    jobs = {
        (round_, number): running(store, group_id=f"g-{round_}", group_index=number, in_chord=True)
        for round_ in range(rounds)
        for number in range(PROCESSES)
    }

    def complete_all(number):
        mine = []
        for round_ in range(rounds):
            job, attempt = jobs[round_, number]
            store.complete(job.job_id, attempt, number)
            parts = store.chord_parts(f"g-{round_}", PROCESSES)
            if parts.is_mine:
                mine.append((round_, list(parts.results)))
        return mine

    published = [entry for mine in in_processes(PROCESSES, complete_all) for entry in mine]

    assert sorted(published) == [(round_, list(range(PROCESSES))) for round_ in range(rounds)]


def test_exactly_one_thread_publishes_the_body_of_a_chord(store):
    members = [running(store, group_id="g", group_index=number, in_chord=True) for number in range(8)]
    published = []

    def complete(job, attempt):
        store.complete(job.job_id, attempt, {})
        published.append(store.chord_parts("g", len(members)).is_mine)

    threads = [threading.Thread(target=complete, args=member) for member in members]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(published) == [False] * 7 + [True]


def heartbeat_of(worker_id):
    return Heartbeat(
        worker_id=worker_id, hostname="h", pid=1, capabilities=[], concurrency=1, status="busy", started_at=now()
    )
