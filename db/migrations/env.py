"""Alembic's environment: migrations run on the connection, and in the transaction, that `db.schema.upgrade` opened."""

from alembic import context

from db.models import metadata
from db.schema import VERSION_TABLE

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table=VERSION_TABLE,
    transactional_ddl=False,
)
context.run_migrations()
