"""Alembic's environment: migrations run on the connection, and in the transaction, that `db.schema.upgrade` opened.

The views are dropped before and made anew afterwards, as SQLite can't alter a table that a view uses. There are no
downgrades: an older release works on a newer minor version, and the way back over a major one is a backup.
"""

from alembic import context

from db import views
from db.models import metadata
from db.schema import VERSION_TABLE

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=metadata, version_table=VERSION_TABLE, transactional_ddl=False)
for statement in views.drop_statements():
    connection.exec_driver_sql(statement)
context.run_migrations()
for statement in views.create_statements(connection.dialect.name):
    connection.exec_driver_sql(statement)
