"""The version of the schema: made, upgraded, or refused with a remedy.

SQLite files create and upgrade themselves at first use; PostgreSQL waits for `celery -A tasks db upgrade`. Versions are
Alembic revisions named `MAJOR_MINOR`: a newer minor only adds what older code can ignore, a newer major is refused.
The version stands in a table of its own, since the database may be shared with the host application.
"""

from typing import Final

from sqlalchemy import inspect, text

from db.engine import Database
from tasks.errors import DatabaseNotReady

HEAD: Final = "1_0"
VERSION_TABLE: Final = "media_tasks_version"


def current_version(database: Database) -> str | None:
    """The revision that the database stands at, or None where there is none."""
    with database.reading() as connection:
        if not inspect(connection).has_table(VERSION_TABLE):
            return None
        return connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar()  # noqa: S608 (a constant)


def ensure_schema(database: Database) -> None:
    """Bring a SQLite file up to date; check a PostgreSQL database.

    Raises:
        DatabaseNotReady: The schema is of a newer major version, or PostgreSQL's is missing or older.
    """
    version = current_version(database)
    if version == HEAD:
        return
    if version is not None and _parts(version) > _parts(HEAD):
        if _parts(version)[0] > _parts(HEAD)[0]:
            raise DatabaseNotReady(
                f"{database} has schema {version}, newer than this release's {HEAD}; install the newer media-tasks"
            )
        return
    if not database.is_sqlite:
        state = "no schema" if version is None else f"schema {version}, older than {HEAD}"
        raise DatabaseNotReady(f"{database} has {state}; run: celery -A tasks db upgrade")
    upgrade(database)


def upgrade(database: Database) -> None:
    """Run the migrations up to HEAD in one transaction; of several processes at once one does it, the rest see it."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", "db:migrations")
    config.set_main_option("path_separator", "os")
    with database.transaction() as connection:
        if not database.is_sqlite:
            connection.execute(text("SELECT pg_advisory_xact_lock(hashtext('media_tasks_upgrade'))"))
        config.attributes["connection"] = connection
        command.upgrade(config, HEAD)


def _parts(version: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in version.split("_"))
    except ValueError as exc:
        raise DatabaseNotReady(f"{VERSION_TABLE} holds {version!r}, which is no version of media-tasks") from exc
