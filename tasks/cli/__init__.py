"""Commands of `celery -A tasks ...`, found by Celery through the entry points `celery.commands`."""
