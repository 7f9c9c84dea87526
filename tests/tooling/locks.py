"""A database that is in the middle of something."""

import sqlite3
import threading


class Lock:
    """Holds the write lock of the job database, as another process that is in the middle of something does: for
    `seconds`, or until `release()`.
    """

    def __init__(self, path, seconds):
        self.path, self.seconds = path, seconds
        self.is_held, self.is_over = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._hold)

    def __enter__(self):
        self.thread.start()
        assert self.is_held.wait(5)
        return self

    def __exit__(self, exc_type, *_):
        if exc_type is not None:
            self.release()
        self.thread.join()

    def release(self):
        self.is_over.set()

    def _hold(self):
        connection = sqlite3.connect(self.path, isolation_level=None, timeout=10)
        connection.execute("BEGIN IMMEDIATE")
        self.is_held.set()
        self.is_over.wait(self.seconds)
        connection.execute("ROLLBACK")
        connection.close()
