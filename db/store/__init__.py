"""The store: every read and write of the job tables, as single atomic statements that carry their fence.

What flows in are plain values, what flows out frozen records. Each transition writes its `task_logs` row in the same
transaction, numbered per job. A write that comes too late (another publication, another attempt, a terminal row)
changes nothing and returns None, False or a decision; none raises for it. Every method is safe to repeat.
"""

from db.store.attempts import Attempts
from db.store.canvases import Canvases
from db.store.dispatch import Dispatch
from db.store.pauses import Pauses
from db.store.reading import Reading
from db.store.relay import Relaying
from db.store.retention import Retention
from db.store.submissions import Submissions
from db.store.workers import Workers

__all__ = ["Store"]


class Store(Submissions, Attempts, Canvases, Dispatch, Workers, Pauses, Reading, Relaying, Retention):
    """All reads and writes of the job tables.

    Args:
        database: Where they are. Its schema is checked (SQLite: made) at the first use by each process.
    """
