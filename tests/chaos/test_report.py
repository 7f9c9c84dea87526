"""The table that a storm prints, and its JSON."""

import json
from datetime import UTC, datetime

from tests.chaos import report
from tests.chaos.audit import Audit, Finding, Recovery
from tests.chaos.crew import Blow
from tests.chaos.scenario import Outcome

AT = datetime(2026, 1, 1, tzinfo=UTC)


def outcome(findings=(), recoveries=()):
    audit = Audit(None, None, ())
    audit.findings.extend(findings)
    audit.recoveries.extend(recoveries)
    kinds = ["child killed"] * 3 + ["worker killed"] * 2 + ["main killed", "broker restarted", "worker stopped"]
    return Outcome(
        combination="redis + postgresql",
        seed=7,
        jobs=300,
        duration_s=61.4,
        audit=audit,
        blows=[Blow(kind, AT) for kind in kinds],
        refusals=0,
        exits=(),
        notes=(),
        directory=None,
    )


def cells(table):
    return {str(column.header): list(column.cells) for column in table.columns}


def test_the_table_has_jobs_kills_by_kind_the_verdicts_and_the_worst_recovery():
    told = outcome(
        [Finding("lost", "it is gone", "a"), Finding("stuck", "it stands", "b"), Finding("lost", "gone, too", "c")],
        [Recovery(0.5, "child killed", "a"), Recovery(21.26, "worker killed", "b"), Recovery(1.0, "child killed", "c")],
    )

    assert cells(report.table_of([told])) == {
        "combination": ["redis + postgresql"],
        "jobs": ["300"],
        "kills: child, worker, main": ["6: 3, 2, 1"],
        "other blows": ["2"],
        "lost": ["2"],
        "duplicated": ["0"],
        "stuck": ["1"],
        "wrong": ["0"],
        "excused": ["0"],
        "recovery: median, worst": ["1.0 s, 21.3 s"],
        "duration": ["61 s"],
        "seed": ["7"],
    }


def test_a_storm_without_a_death_has_no_recovery():
    assert cells(report.table_of([outcome()]))["recovery: median, worst"] == ["-"]


def test_the_json_has_the_findings_and_what_is_needed_to_run_it_again():
    (told,) = json.loads(report.as_json([outcome([Finding("wrong", "other bytes", "a")])]))

    assert (told["combination"], told["seed"], told["jobs"], told["wrong"]) == ("redis + postgresql", 7, 300, 1)
    assert told["findings"] == [{"verdict": "wrong", "text": "other bytes", "job_id": "a"}]
    assert told["blows"]["child killed"] == 3
