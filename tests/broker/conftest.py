"""A broker file of the test's own, and connections and stores on it that are closed in the end."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import kombu
import pytest

import tasks.broker
from tasks.broker.messages import MessageStore

tasks.broker.register()


@pytest.fixture
def broker_path(tmp_path: Path) -> Path:
    return tmp_path / "broker.db"


@pytest.fixture
def connect(broker_path: Path) -> Iterator[Callable[..., kombu.Connection]]:
    """`connect(**transport_options)` makes one more connection, like that of another process."""
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(
            kombu.Connection(f"sqlite:///{broker_path}", transport_options=options)
        )


@pytest.fixture
def open_store(broker_path: Path) -> Iterator[Callable[..., MessageStore]]:
    with ExitStack() as stack:

        def start(**options: Any) -> MessageStore:
            store = MessageStore(broker_path, **options)
            stack.callback(store.close)
            store.open()
            return store

        yield start


@pytest.fixture
def store(open_store: Callable[..., MessageStore]) -> MessageStore:
    return open_store()
