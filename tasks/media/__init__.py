"""Pure functions on media files: paths and options in, files and small dicts out. No celery, no database."""
