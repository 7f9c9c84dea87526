"""What a producer pays to start: fresh processes that import the package, against some that make a Celery app."""

import subprocess
import sys
import time

from benchmarks.measure import Options, Row, interleaved, ratio_row
from benchmarks.workers import environment_of, settings

ENGINES = ("pyvips", "av", "PIL", "numpy")
STATEMENTS = {
    "`import tasks`": "import tasks",
    "`from tasks import image_resize`": "from tasks import image_resize",
    "an app": "import celery; celery.Celery('x')",
}


def measure(options: Options) -> list[Row]:
    environment = environment_of(settings(options.folder / "imports"))

    def seconds(statement: str) -> float:
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-c", statement], check=True, env=environment)
        return time.perf_counter() - begun

    contenders = {name: lambda statement=statement: seconds(statement) for name, statement in STATEMENTS.items()}
    for run in contenders.values():
        run()
    times = interleaved(contenders, options.rounds(7, 21))
    rows = [
        ratio_row(
            f"{name} against `import celery` and creating an app",
            "≤ 1.3",
            [1000 * second for second in times[name]],
            [1000 * second for second in times["an app"]],
            unit="ms",
            against="an app",
        )
        for name in list(STATEMENTS)[:2]
    ]
    loaded = subprocess.run(
        [
            sys.executable,
            "-c",
            f"from tasks import image_resize; import sys; print(*(set({ENGINES}) & {{*sys.modules}}))",
        ],
        check=True,
        capture_output=True,
        text=True,
        env=environment,
    ).stdout.split()
    rows.append(
        Row(
            figure=f"media engines that `from tasks import image_resize` loads, of {', '.join(ENGINES)}",
            target="none",
            measured=f"**{', '.join(loaded) or 'none'}**",
            value=len(loaded),
        )
    )
    return rows
