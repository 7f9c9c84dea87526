"""Celery's settings, built from the project's own (`tasks.settings`, the only reader of the environment)."""

from typing import Any

from tasks.brokers import EMBEDDED, REDIS
from tasks.settings import VISIBILITY_TIMEOUT_S, settings

_settings = settings()

broker_url = _settings.broker_url
broker_connection_retry_on_startup = True
result_backend = "tasks.celery:result_backend" if _settings.mirror else "disabled"

# JSON only: a pickle in a message would run code.
task_serializer = "json"
result_serializer = "json"
event_serializer = "json"
accept_content = ["json"]
result_accept_content = ["json"]

# A message is acknowledged when its job has ended, and goes back when its process dies: nothing is lost in between.
task_acks_late = True
task_reject_on_worker_lost = True
# Media jobs are long: a worker that reserves more than it can run keeps them from an idle one.
worker_prefetch_multiplier = 1
# The guard writes that a job has started; Celery's own STARTED would be a second write.
task_track_started = False
task_annotations = {"*": {"max_retries": _settings.max_attempts - 1}}

task_default_queue = "celery"
task_queue_max_priority = 10
task_create_missing_queues = True
# Events cost a worker 0.3 ms a job; Flower switches them on in all workers while it runs (`-E` does so for good).
worker_send_task_events = False
task_send_sent_event = False

# Codecs leak and fragment: a child is replaced after 1,000 jobs (its start costs about five jobs of 400 px), or once it
# has grown past 300 MB (KiB here), half as much again as an input of 24 MP needs.
worker_max_tasks_per_child = 1000
worker_max_memory_per_child = 300_000
worker_hijack_root_logger = True
# Refuses what is no task message, and keeps what messages hold out of the log.
worker_consumer = "tasks.consumer:MediaConsumer"
worker_cancel_long_running_tasks_on_connection_loss = False
# After a lost connection Celery would take fewer messages until as many jobs have ended; a pool of threads can be left
# without any. The guard has no use for it: what comes back of a running job is acknowledged at once.
worker_enable_prefetch_count_reduction = False

timezone = "UTC"
enable_utc = True


def _transport_options() -> dict[str, Any]:
    kind = _settings.broker_kind
    if kind is EMBEDDED:
        return {
            "queue_strategy": dict(_settings.queue_strategy),
            "poll_interval": _settings.worker_poll_interval_s,
        }
    if kind is REDIS:
        # Ten lists a queue, 0 served first; the visibility timeout must be longer than the longest job.
        return {
            "priority_steps": list(range(10)),
            "queue_order_strategy": "priority",
            "visibility_timeout": VISIBILITY_TIMEOUT_S,
            # A server that is frozen blocks nobody for ever; longer than kombu waits for a message (1 s).
            "socket_timeout": 10,
            "socket_connect_timeout": 5,
        }
    return {}


broker_transport_options = _transport_options()
