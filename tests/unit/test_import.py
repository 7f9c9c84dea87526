"""What a producer pays: importing the package does no I/O and loads no engine, and leaves the host's Celery alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
ENGINES = ("pyvips", "PIL", "av", "numpy", "pillow_heif")


def run(code, **env):
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd="/",
        env={"PYTHONPATH": str(REPOSITORY), "HOME": "/dev/null", **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("statement", ["import tasks", "from tasks import image_resize", "from tasks import app"])
def test_a_producers_import_loads_no_engine_and_no_database_library(statement):
    loaded = json.loads(run(f"{statement}\nimport json, sys; print(json.dumps(sorted(sys.modules)))"))

    assert [name for name in (*ENGINES, "sqlalchemy", "alembic", "psycopg") if name in loaded] == []


FOREIGN = "broker_url = 'redis://nowhere'\nresult_backend = 'file:///nowhere'\n"


def test_a_host_projects_own_celery_settings_are_not_ours(tmp_path):
    (tmp_path / "celeryconfig.py").write_text(FOREIGN)
    host = "import celeryconfig; from celery import Celery; host = Celery(); host.config_from_object('celeryconfig')"
    ask = "from tasks import app; print(app.conf.broker_url, app.conf.result_backend, host.conf.broker_url)"

    said = run(f"{host}\n{ask}", PYTHONPATH=f"{tmp_path}:{REPOSITORY}", CL_SERVER_DIR=str(tmp_path))

    assert said.split() == [f"sqlite:///{tmp_path}/broker.db", "tasks.celery:result_backend", "redis://nowhere"]


def test_a_result_is_read_by_its_id_alone(tmp_path):
    submit = "from tasks import image_resize; print(image_resize.delay('/in.jpg', '/out.jpg', width=9).id)"
    job_id = run(submit, CL_SERVER_DIR=str(tmp_path)).strip()

    read = f"from celery.result import AsyncResult; print(AsyncResult({job_id!r}).state)"
    assert run(read, CL_SERVER_DIR=str(tmp_path)).strip() == "PENDING"
    cancel = f"from tasks import control; control.cancel({job_id!r})"
    assert run(f"{cancel}\n{read}", CL_SERVER_DIR=str(tmp_path)).strip() == "REVOKED"


AUDIT = """
import sys
seen = []
def hook(event, args):
    if event in ("socket.connect", "socket.bind", "sqlite3.connect", "subprocess.Popen", "os.mkdir", "os.fork"):
        seen.append(f"{event} {args!r}")
    elif event == "open" and isinstance(args[0], (str, bytes)):
        path = args[0] if isinstance(args[0], str) else args[0].decode()
        is_module = path.endswith((".py", ".pyc", ".so")) or "__pycache__" in path
        is_metadata = ".dist-info" in path or ".egg-info" in path
        is_import_path = path.endswith((".zip", ".__path_hook__"))
        if not (is_module or is_metadata or is_import_path):
            seen.append(f"open {path}")
sys.addaudithook(hook)
"""


def test_a_producers_import_opens_nothing_but_modules():
    seen = run(f"{AUDIT}\nfrom tasks import image_resize\nprint(*seen, sep=chr(10))")

    assert seen.strip().splitlines() == []


def test_the_audit_sees_what_is_opened():
    seen = run(f"{AUDIT}\nimport sqlite3; sqlite3.connect(':memory:'); open('/dev/null')\nprint(*seen, sep=chr(10))")

    assert "sqlite3.connect" in seen
    assert "open /dev/null" in seen


def test_no_thread_is_started_by_an_import():
    assert run("from tasks import image_resize; import threading; print(threading.active_count())") == "1\n"


def test_the_shared_tasks_of_a_host_project_stay_its_own():
    code = """
from celery import Celery, current_app, shared_task
host = Celery("host", broker="memory://")
@shared_task
def mine(): return 1
import tasks
from tasks import image_resize
from tasks.job import Job
print(current_app.main, mine.app.main, isinstance(mine, Job), image_resize.app.main, isinstance(image_resize, Job))
"""
    assert run(code) == "host host False media_tasks True\n"


def test_the_order_of_imports_does_not_matter_to_a_host_project():
    code = """
from tasks import image_resize
from celery import Celery, current_app, shared_task
host = Celery("host", broker="memory://")
@shared_task
def mine(): return 1
print(current_app.main, mine.app.main)
"""
    assert run(code) == "host host\n"


def test_an_unknown_name_is_an_import_error_that_says_why():
    code = """
try: from tasks import image_rezise
except ImportError as exc: print(exc)
"""
    assert "image_rezise" in run(code)


def test_submodules_can_be_imported_without_the_app():
    code = "import tasks.broker, tasks.errors, tasks.settings, sys; print('tasks.celery' in sys.modules)"

    assert run(code) == "False\n"
