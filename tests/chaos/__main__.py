"""`python -m tests.chaos [embedded|rabbitmq|redis|all]`: run scenarios one after the other, print what they came to."""

import argparse
import random
import signal
import sys
from pathlib import Path

from tests.chaos import report
from tests.chaos.scenario import COMBINATIONS, Scenario, Size
from tests.services import ServiceMissing
from tests.tooling.environment import forget_host_settings


def main() -> int:
    """0 if every job of every scenario ended as it must; 1 if not, 2 if a server is missing."""
    arguments = _arguments()
    forget_host_settings()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that servers and workers go, too
    wanted = COMBINATIONS if arguments.combination == "all" else (arguments.combination,)
    size = Size(arguments.jobs, arguments.kills, arguments.workers, arguments.hosts, arguments.minutes)
    outcomes, is_missing = [], False
    for combination in wanted:
        try:
            outcomes.append(Scenario(combination, arguments.seed, size, keep=arguments.keep).run())
        except ServiceMissing as exc:
            print(f"{combination} was left out: {exc}", file=sys.stderr)
            is_missing = True
    report.print_outcomes(outcomes)
    if arguments.json:
        arguments.json.write_text(report.as_json(outcomes))
    if not all(outcome.is_clean for outcome in outcomes):
        return 1
    return 2 if is_missing else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make chaos", description="Kill, stop and starve workers; count what is lost."
    )
    parser.add_argument("combination", nargs="?", default="all", choices=[*COMBINATIONS, "all"])
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1_000_000))
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--hosts", type=int, default=1, help="to spread the workers over")
    parser.add_argument("--minutes", type=float, help="how long jobs are submitted (default: as the cores can bear)")
    parser.add_argument("--keep", action="store_true", help="keep logs and stories also when nothing was found")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    arguments = parser.parse_args()
    if arguments.hosts > 1 and arguments.combination not in ("rabbitmq", "redis"):
        parser.error("--hosts goes with rabbitmq or redis: the embedded broker serves one host")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
