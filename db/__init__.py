"""The job database: tables, views, migrations, and the one `Store` through which all reads and writes go."""
