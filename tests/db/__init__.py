"""Tests of the job database: the same on SQLite and on PostgreSQL, wherever both have to answer alike."""
