"""What holds for the repository as a whole: locks, make targets, paths and the broker's imports."""

import ast
import configparser
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
LOCKS = ("requirements/runtime.txt", "requirements/dev.txt")
MAKE_TARGETS = (
    *("help", ".venv", "demo", "test", "lint", "slow", "mqtt"),
    *("conformance", "chaos", "bench", "lock", "clean"),
)
# Split here and there, so that this file does not hold what it looks for.
MACHINE_PATH = re.compile(
    r"(?<![\w.$}/-])/(?:work|root|opt/pypi[\w-]*|opt/wheels|home/(?!user\b|me\b)\w+|Users)/[\w.-]"
)
REGISTRY = re.compile("python" r"hosted\.org|py" r"pi\.org/simple|-index-url[ =]\w+:|--find[-]links")


def tracked_files() -> list[Path]:
    """Every file that git tracks or would; skips where this is no git work tree (an unpacked archive)."""
    if not shutil.which("git"):
        pytest.skip("needs git (Debian: apt-get install git) to know which files belong to the repository")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"needs git and a clone: {done.stderr.strip()}")
    return [REPOSITORY / name for name in done.stdout.split("\0") if name and (REPOSITORY / name).is_file()]


def requirements(lock: str) -> list[str]:
    """The logical lines of a lock: one for each package."""
    text = (REPOSITORY / lock).read_text().replace("\\\n", " ")
    return [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]


@pytest.mark.parametrize("lock", LOCKS)
def test_every_locked_package_has_one_version_and_hashes(lock):
    for line in requirements(lock):
        assert re.match(r"[a-z0-9._-]+==\S+ ", line), line
        assert "--hash=sha256:" in line, line


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_names_no_host(lock):
    text = (REPOSITORY / lock).read_text()

    assert "://" not in text
    assert not re.search(r"--(extra-)?index-url|--find[-]links|^-", text, re.MULTILINE)


def test_both_locks_agree_on_every_version():
    runtime, dev = ({line.split()[0] for line in requirements(lock)} for lock in LOCKS)

    assert runtime <= dev


def test_everything_that_pyproject_asks_for_is_locked():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    asked = project["project"]["dependencies"] + project["dependency-groups"]["build"]
    for extra in ("image", "heif", "flower"):
        asked += project["project"]["optional-dependencies"][extra]

    def names(lines: list[str]) -> set[str]:
        return {re.split(r"[\[<>=;\s]", line)[0].lower().replace("_", "-") for line in lines}

    assert names(asked) <= names(requirements("requirements/runtime.txt"))
    dev = [line for line in project["dependency-groups"]["dev"] if isinstance(line, str)]
    assert names(dev) <= names(requirements("requirements/dev.txt"))


def test_make_help_lists_every_target():
    listing = subprocess.run(["make", "help"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout

    assert re.findall(r"^  make (\S+)", listing, re.MULTILINE) == list(MAKE_TARGETS)


def test_make_says_what_is_missing_where_there_is_no_new_python():
    command = ["make", "python", "PYTHON=no-such-python"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)

    assert done.returncode != 0
    assert "No Python 3.11 or newer with venv was found as no-such-python" in done.stderr
    assert "apt-get install python3 python3-venv" in done.stderr


def test_no_file_names_a_path_of_a_developers_machine_or_a_registry():
    found = []
    for path in tracked_files():
        try:
            lines = path.read_text().splitlines()
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(lines, 1):
            if match := MACHINE_PATH.search(line) or REGISTRY.search(line):
                found.append(f"{path.relative_to(REPOSITORY)}:{number}: {match[0]}")

    assert found == []


@pytest.mark.parametrize(
    "text", ["see /wo" + "rk/main/x", "'/ro" + "ot/.cache'", "= /ho" + "me/bob/x", "--find" + "-links"]
)
def test_the_search_for_paths_and_registries_finds_them(text):
    assert MACHINE_PATH.search(text) or REGISTRY.search(text)


@pytest.mark.parametrize(
    "text", ["{CL_SERVER_DIR}/wo" + "rk/x", "out/wo" + "rk/x", "s3://bucket/ro" + "ot/x", "/home/user/in.jpg"]
)
def test_the_search_for_paths_leaves_others_alone(text):
    assert not MACHINE_PATH.search(text)


def test_every_module_of_tasks_stands_on_the_floor_plan():
    plan = configparser.ConfigParser()
    plan.read(REPOSITORY / ".importlinter")
    placed = set(re.findall(r"tasks\.(\w+)", plan["importlinter:contract:floors"]["layers"]))
    packages = {path.parent.name for path in (REPOSITORY / "tasks").glob("*/__init__.py")}
    modules = {path.stem for path in (REPOSITORY / "tasks").glob("*.py")} - {"__init__"}

    assert (packages | modules) - placed == set(), "give it a line in .importlinter"


def test_the_broker_imports_kombu_and_the_standard_library_only():
    allowed = sys.stdlib_module_names | {"kombu", "amqp", "vine"}  # kombu itself stands on amqp and vine
    files = sorted((REPOSITORY / "tasks" / "broker").rglob("*.py"))
    assert files
    foreign = []
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            foreign += [
                f"{path.relative_to(REPOSITORY)}: {name}"
                for name in names
                if not name.startswith("tasks.broker") and name.partition(".")[0] not in allowed
            ]

    assert foreign == []
