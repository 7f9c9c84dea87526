"""A paho client as the settings want it: MQTT 5, credentials, TLS. It is not connected yet, and has no thread.

Only the process that makes a client uses it: children that are forked let go of what they inherit.
"""

import os
import ssl
import weakref
from typing import TYPE_CHECKING, Any, Final

from tasks.errors import SettingsError
from tasks.settings import Settings

if TYPE_CHECKING:
    from paho.mqtt.client import Client

# A broker tells of a silent client after one and a half times this; measured: 7-9 s.
KEEPALIVE_S = 5


def new_client(settings: Settings, client_id: str, **options: Any) -> "Client":
    """Make a client.

    Raises:
        SettingsError: A certificate, key or secret's file can't be used; the message names the variable.
    """
    from paho.mqtt.client import Client, MQTTv5
    from paho.mqtt.enums import CallbackAPIVersion

    if settings.mqtt_unusable is not None:
        raise SettingsError(settings.mqtt_unusable)
    client = Client(CallbackAPIVersion.VERSION2, client_id=client_id, protocol=MQTTv5, **options)
    if settings.mqtt_username is not None:
        client.username_pw_set(settings.mqtt_username, settings.mqtt_password)
    if settings.mqtt_use_tls:
        client.tls_set_context(_tls(settings))
    client.reconnect_delay_set(min_delay=1, max_delay=30)
    _clients.add(client)
    return client


def _tls(settings: Settings) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=settings.mqtt_ca_cert)
    except (OSError, ssl.SSLError) as exc:
        raise SettingsError(f"MQTT_CA_CERT={settings.mqtt_ca_cert!r} can't be used: {exc}") from exc
    if settings.mqtt_client_cert is not None:
        try:
            context.load_cert_chain(settings.mqtt_client_cert, settings.mqtt_client_key, _no_passphrase)
        except (OSError, ssl.SSLError) as exc:
            raise SettingsError(
                f"MQTT_CLIENT_CERT={settings.mqtt_client_cert!r} with MQTT_CLIENT_KEY can't be used: {exc}"
            ) from exc
    return context


def _no_passphrase() -> str:
    """Asked of for an encrypted key; without it OpenSSL would ask at the terminal."""
    raise SettingsError(
        "MQTT_CLIENT_KEY has a passphrase, which nobody could enter; give a key without one (openssl pkey -in KEY -out "
        "KEY-WITHOUT), which only this user may read"
    )


_clients: "weakref.WeakSet[Client]" = weakref.WeakSet()
_inherited: Final[list["Client"]] = []


def _after_fork_in_child() -> None:
    """Close the parent's socket here without a word to the broker, and let nothing touch the client again."""
    for client in list(_clients):
        _inherited.append(client)
        connection: Any = client.socket()
        if connection is not None and connection.fileno() >= 0:
            os.close(connection.detach())
    _clients.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
