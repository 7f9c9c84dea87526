"""Celery apps to measure, and to measure against; the environment says which broker they use."""
