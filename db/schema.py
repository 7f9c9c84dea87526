"""The version of the schema: made, upgraded, or refused with a remedy.

SQLite files create and upgrade themselves at first use; PostgreSQL waits for `celery -A tasks db upgrade`. Versions are
Alembic revisions named `MAJOR_MINOR`: a newer minor only adds what older code can ignore, a newer major is refused.
The version stands in a table of its own, since the database may be shared with the host application.
"""

from typing import Final

from sqlalchemy import Connection, inspect, text

from db import views
from db.engine import Database
from db.models import metadata
from tasks.errors import DatabaseNotReady

HEAD: Final = "1_0"
VERSION_TABLE: Final = "media_tasks_version"
_NAMES: Final = {*metadata.tables, *views.NAMES}


def current_version(database: Database) -> str | None:
    """The revision that the database stands at, or None where there is none."""
    with database.reading() as connection:
        return _version(connection)


def ensure_schema(database: Database) -> None:
    """Bring a SQLite file up to date; check a PostgreSQL database. Asks the database once in each process.

    Raises:
        DatabaseNotReady: The schema is of a newer major version, or PostgreSQL's is missing or older.
    """
    database.close_if_replaced()
    if database.is_checked:
        return
    version = current_version(database)
    if not _is_usable(database, version):
        if not database.is_sqlite:
            state = "no schema" if version is None else f"schema {version}, older than {HEAD}"
            raise DatabaseNotReady(f"{database} has {state}; run: celery -A tasks db upgrade")
        upgrade(database)
    database.is_checked = True


def upgrade(database: Database) -> None:
    """Run the migrations up to HEAD in one transaction; of several processes at once one does it, the rest see it.

    Raises:
        DatabaseNotReady: The schema is of a newer major version, or the database has foreign tables of our names.
    """
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", "db:migrations")
    config.set_main_option("path_separator", "os")
    with database.transaction() as connection:
        if not database.is_sqlite:
            connection.execute(text("SELECT pg_advisory_xact_lock(hashtext('media_tasks_upgrade'))"))
        version = _version(connection)
        if _is_usable(database, version):
            return
        if version is None:
            _refuse_foreign_tables(database, connection)
        config.attributes["connection"] = connection
        command.upgrade(config, HEAD)


def _version(connection: Connection) -> str | None:
    if not inspect(connection).has_table(VERSION_TABLE):
        return None
    return connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar()  # noqa: S608 (a constant)


def _is_usable(database: Database, version: str | None) -> bool:
    """Whether the schema is HEAD or a newer minor version; False if it has to be made or upgraded."""
    if version is None or version == HEAD:
        return version is not None
    have, want = _parts(database, version), _parts(database, HEAD)
    if have[0] > want[0]:
        raise DatabaseNotReady(
            f"{database} has schema {version}, newer than this release's {HEAD}; install the newer media-tasks"
        )
    return have > want


def _refuse_foreign_tables(database: Database, connection: Connection) -> None:
    taken = sorted({*inspect(connection).get_table_names(), *inspect(connection).get_view_names()} & _NAMES)
    if taken:
        raise DatabaseNotReady(
            f"{database} has {', '.join(taken)} of another application; set DATABASE_URL to another database"
        )


def _parts(database: Database, version: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in version.split("_"))
    except ValueError as exc:
        raise DatabaseNotReady(
            f"{database}: {VERSION_TABLE} holds {version!r}, which is no version of media-tasks"
        ) from exc
