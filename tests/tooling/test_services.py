"""The server fixtures give what they promise: real servers, a part of each for one run, and servers to break."""

import os
import subprocess
import sys
from pathlib import Path

import kombu
import psycopg
import pytest
import redis
import sqlalchemy
from paho.mqtt import publish, subscribe

from tests import services
from tests.tooling.waiting import eventually

REPOSITORY = Path(__file__).resolve().parents[2]


def test_postgres_url_leads_to_a_database_of_its_own(postgres_url):
    engine = sqlalchemy.create_engine(postgres_url, poolclass=sqlalchemy.NullPool)

    with engine.connect() as connection:
        answer, database = connection.execute(sqlalchemy.text("SELECT 1, current_database()")).one()

    assert answer == 1
    assert database.startswith(f"media_tasks_test_{os.getpid()}_")


def test_a_postgres_database_is_dropped_even_while_a_client_is_connected(postgres_server):
    with postgres_server.database() as url:
        name = sqlalchemy.make_url(url).database
        client = postgres_server.connect(name)

    with postgres_server.connect() as connection:
        left = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [name]).fetchone()
    client.close()
    assert left is None


def test_a_queue_of_one_rabbitmq_vhost_is_not_seen_in_another(rabbitmq_url, fresh_rabbitmq_url):
    with kombu.Connection(rabbitmq_url) as first, kombu.Connection(fresh_rabbitmq_url) as second:
        first.SimpleQueue("apart").put("only here")

        assert first.SimpleQueue("apart").qsize() == 1
        assert second.SimpleQueue("apart").qsize() == 0


def test_a_rabbitmq_vhost_is_gone_after_its_block(rabbitmq_server):
    if not rabbitmq_server.control:
        pytest.skip("rabbitmqctl can't be used here: vhosts need root or the user rabbitmq")
    with rabbitmq_server.vhost() as url:
        vhost = url.rpartition("/")[2]
        assert rabbitmq_server.answers(vhost)

    assert not rabbitmq_server.answers(vhost)


def test_redis_url_is_a_number_that_no_other_test_gets(redis_url, fresh_redis_url):
    with redis.Redis.from_url(redis_url) as first, redis.Redis.from_url(fresh_redis_url) as second:
        first.set("apart", 1)

        assert second.get("apart") is None


def test_a_redis_number_stays_with_whoever_flushes_it(private_redis):
    server = private_redis("--databases", "2").server
    with server.database() as url, redis.Redis.from_url(url) as client:
        client.flushdb()

        with pytest.raises(services.ServiceMissing, match="all 2 database numbers"), server.database():
            pass

    with server.database() as again:
        assert again == url


def test_a_redis_number_left_by_a_killed_run_is_taken_over(private_redis):
    server = private_redis("--databases", "2").server
    with server.client(0) as owners, server.client(1) as client:
        owners.set(server.OWNER_KEY.format(1), "999999999")
        client.set("rubbish", "1")

    with server.database() as url, redis.Redis.from_url(url) as client:
        assert client.get("rubbish") is None


def test_nothing_retained_stays_under_the_topic_prefix(mosquitto_server):
    with mosquitto_server.prefix() as mine:
        topic = f"{mine.topic_prefix}/worker-1"
        publish.single(topic, "here", qos=1, retain=True, hostname=mine.host, port=mine.port)
        assert subscribe.simple(topic, hostname=mine.host, port=mine.port).payload == b"here"

    publish.single(topic, "a marker", qos=1, retain=True, hostname=mine.host, port=mine.port)
    assert subscribe.simple(topic, hostname=mine.host, port=mine.port).payload == b"a marker"
    publish.single(topic, None, qos=1, retain=True, hostname=mine.host, port=mine.port)


def test_a_private_postgres_keeps_its_data_over_a_kill(private_postgres):
    server = private_postgres()
    with psycopg.connect(server.url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute("CREATE TABLE kept (n int)")

    server.kill9()
    assert not server.server.can_create_databases()
    server.start()

    with psycopg.connect(server.url.replace("+psycopg", "")) as connection:
        assert connection.execute("SELECT count(*) FROM kept").fetchone() == (0,)


def test_a_private_redis_can_be_frozen(private_redis):
    server = private_redis()

    server.pause()
    with redis.Redis.from_url(server.url, socket_timeout=0.2, retry=None) as client, pytest.raises(redis.TimeoutError):
        client.ping()
    server.resume()

    eventually(server.server.answers, 5)


def test_a_private_rabbitmq_stops_and_starts_with_its_queues_and_leaves_nothing(private_rabbitmq):
    server = private_rabbitmq()
    with kombu.Connection(server.url) as connection:
        connection.SimpleQueue("kept").put("still here")

    server.stop()
    assert not server.server.answers()
    server.start()

    with kombu.Connection(server.url) as connection:
        assert connection.SimpleQueue("kept").get(timeout=5).payload == "still here"
    folder = server.folder
    server.remove()
    assert not folder.exists()
    listing = subprocess.run(["ps", "-A", "-o", "args"], capture_output=True, text=True, check=True).stdout
    assert str(folder) not in listing
    assert f"epmd -port {server._mapper_port}" not in listing


def test_a_private_mosquitto_can_refuse_strangers(private_mosquitto):
    server = private_mosquitto(allow_anonymous=False)

    assert not server.server.answers()


@pytest.mark.parametrize(("ci", "outcome"), [("true", "failed"), ("", "skipped")])
def test_a_missing_server_skips_with_its_remedy_and_fails_in_ci(tmp_path, ci, outcome):
    # Given a machine with no server and no server program
    (tmp_path / "test_needs_mosquitto.py").write_text("def test_it(mosquitto): ...\n")
    (tmp_path / "conftest.py").write_text(
        "from tests import services\n"
        "from tests.conftest import mosquitto, mosquitto_server\n"
        "services.standard_mosquitto = lambda: None\n"
        "services.find_program = lambda *_: None\n"
    )

    # When a test that needs one runs
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-rsf", "-p", "no:cacheprovider", "--rootdir", tmp_path, tmp_path],
        env={**os.environ, "CI": ci, "PYTHONPATH": str(REPOSITORY)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    # Then it says what is missing and how to get it
    assert f"1 {outcome}" in done.stdout or (ci and "1 error" in done.stdout), done.stdout + done.stderr
    assert "Mosquitto gives no access on local port 1883" in done.stdout
    assert "apt-get install mosquitto" in done.stdout
    assert done.returncode == (1 if ci else 0)


def test_a_program_is_found_in_the_last_of_several_versions_folders(tmp_path):
    for version in ("14", "16"):
        program = tmp_path / version / "bin" / "postgres"
        program.parent.mkdir(parents=True)
        program.touch(mode=0o755)

    assert services.find_program("postgres", f"{tmp_path}/*/bin") == tmp_path / "16" / "bin" / "postgres"
