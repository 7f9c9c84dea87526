"""kombu's own conformance classes on the SQLite transport. `.ci/conformance.sh` fetches them and runs this file."""

import kombu
import pytest
from t.integration import common

import tasks.broker

tasks.broker.register()


@pytest.fixture
def connection(tmp_path):
    return kombu.Connection(f"sqlite://localhost:1/{tmp_path}/broker.db")


@pytest.fixture
def invalid_connection(tmp_path):
    return kombu.Connection(f"sqlite://localhost:12345/{tmp_path}/missing/broker.db")


@pytest.fixture
def failover_connection(tmp_path):
    return kombu.Connection(
        f"sqlite://localhost:12345/{tmp_path}/missing/broker.db;sqlite://localhost:1/{tmp_path}/broker.db"
    )


class TestBasicFunctionality(common.BasicFunctionality):
    pass


class TestExchangeTypes(common.BaseExchangeTypes):
    pass


class TestTimeToLive(common.BaseTimeToLive):
    pass


class TestPriority(common.BasePriority):
    pass


class TestMessage(common.BaseMessage):
    pass


class TestEventLoop(common.BaseEventLoop):
    pass


class TestFailover(common.BaseFailover):
    pass
