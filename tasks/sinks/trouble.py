"""What keeps a client from its MQTT broker, or from what was meant, as lines that name the variable; never a secret.

In: the settings, and what paho raised or was answered. Out: text, for a warning or the end of a command.
"""

import socket
import ssl
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from paho.mqtt.reasoncodes import ReasonCode

    from tasks.settings import Settings

# https://docs.oasis-open.org/mqtt/mqtt/v5.0/os/mqtt-v5.0-os.html, 3.2.2.2
UNSUPPORTED_VERSION: Final = 0x84
BAD_CLIENT_ID: Final = 0x85
BAD_CREDENTIALS: Final = 0x86
NOT_AUTHORIZED: Final = 0x87
# OpenSSL's X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH
WRONG_NAME: Final = (62, 64)
# What a broker that wants another client certificate, or one at all, says in the handshake.
CLIENT_CERTIFICATE_ALERTS: Final = (
    "CERTIFICATE_REQUIRED",
    "BAD_CERTIFICATE",
    "UNKNOWN_CA",
    "CERTIFICATE_UNKNOWN",
    "HANDSHAKE_FAILURE",
)
# Kinds of reasons: of each the first one is worth a warning.
UNREACHABLE: Final = "unreachable"
SILENCE: Final = "silence"
REFUSAL: Final = "refusal"


def address(settings: "Settings") -> str:
    return f"{settings.mqtt_broker}:{settings.mqtt_port}"


def ignored(settings: "Settings") -> list[str]:
    """What is set and has no effect, for lack of another variable."""
    said = []
    files = {
        "MQTT_CA_CERT": settings.mqtt_ca_cert,
        "MQTT_CLIENT_CERT": settings.mqtt_client_cert,
        "MQTT_CLIENT_KEY": settings.mqtt_client_key,
    }
    given = " and ".join(name for name, file in files.items() if file is not None)
    if given and not settings.mqtt_use_tls:
        said.append(
            f"MQTT_USE_TLS is off in spite of {given}: all goes to the MQTT broker {address(settings)} in clear, "
            f"a password too; set MQTT_USE_TLS=on, or unset {given}"
        )
    elif files["MQTT_CLIENT_KEY"] is not None and files["MQTT_CLIENT_CERT"] is None:
        said.append("MQTT_CLIENT_KEY is not used without MQTT_CLIENT_CERT; set both, or neither")
    if settings.mqtt_password is not None and settings.mqtt_username is None:
        said.append("MQTT_PASSWORD is not sent without MQTT_USERNAME; set both, or neither")
    return said


def unreachable(settings: "Settings", exc: Exception) -> str:
    """Why no connection could be made."""
    if isinstance(exc, (socket.gaierror, UnicodeError)):
        return f"MQTT_BROKER={settings.mqtt_broker!r} is no host that can be found ({_reason(exc)})"
    if isinstance(exc, ssl.SSLCertVerificationError):
        return _untrusted(settings, exc)
    if isinstance(exc, ssl.SSLError) and any(alert in (exc.reason or "") for alert in CLIENT_CERTIFICATE_ALERTS):
        return f"the MQTT broker {address(settings)} refuses MQTT_CLIENT_CERT, or wants one ({_reason(exc)})"
    if isinstance(exc, ssl.SSLError) or (settings.mqtt_use_tls and isinstance(exc, ConnectionResetError)):
        return (
            f"the MQTT broker {address(settings)} does not answer in TLS ({_reason(exc)}); "
            "set MQTT_PORT to its TLS listener, or unset MQTT_USE_TLS"
        )
    if isinstance(exc, TimeoutError):
        return no_answer(settings)
    return (
        f"no MQTT broker can be reached at {address(settings)} ({_reason(exc)}); "
        "is it running, and are MQTT_BROKER and MQTT_PORT right?"
    )


def kind(settings: "Settings", exc: Exception) -> str:
    """What kind of reason that is. Of one kind they may differ from one try to the next."""
    if isinstance(exc, socket.gaierror):
        return "host"
    if isinstance(exc, ssl.SSLCertVerificationError):
        return "certificate"
    if isinstance(exc, ssl.SSLError) or (settings.mqtt_use_tls and isinstance(exc, ConnectionResetError)):
        return "TLS"
    return SILENCE if isinstance(exc, TimeoutError) else UNREACHABLE


def lost(settings: "Settings", code: "ReasonCode") -> str:
    return f"the connection to the MQTT broker {address(settings)} is lost ({code})"


def no_answer(settings: "Settings") -> str:
    """It takes the connection and says nothing, or closes it without a word."""
    listener = (
        "does it want a client certificate (MQTT_CLIENT_CERT)?"
        if settings.mqtt_use_tls
        else "does it speak TLS there (MQTT_USE_TLS=on), or is MQTT_PORT that of something else?"
    )
    return f"the MQTT broker {address(settings)} does not answer; is it overloaded, or {listener}"


def refused(settings: "Settings", code: "ReasonCode") -> str:
    """Why the broker refused the connection, by the reason code of its CONNACK."""
    reason = f"{address(settings)} refuses the connection ({code})"
    if code.value in (BAD_CREDENTIALS, NOT_AUTHORIZED):
        if settings.mqtt_username is None:
            return f"the MQTT broker {reason}; set MQTT_USERNAME and MQTT_PASSWORD"
        return f"the MQTT broker {reason}; look at MQTT_USERNAME and MQTT_PASSWORD"
    if code.value == UNSUPPORTED_VERSION:
        return f"the MQTT broker {reason}; set MQTT_BROKER to one that speaks MQTT 5"
    if code.value == BAD_CLIENT_ID:
        return f"the MQTT broker {reason}; WORKER_ID is the client id of a worker, choose another one"
    return f"the MQTT broker {reason}; its log may say more about it (MQTT_BROKER)"


def _untrusted(settings: "Settings", exc: ssl.SSLCertVerificationError) -> str:
    if exc.verify_code in WRONG_NAME:
        return (
            f"MQTT_BROKER={settings.mqtt_broker!r} is not the name in the broker's certificate ({exc.verify_message})"
        )
    by = "the CAs of this machine" if settings.mqtt_ca_cert is None else repr(settings.mqtt_ca_cert)
    return (
        f"the certificate of the MQTT broker {address(settings)} is not trusted by {by} ({exc.verify_message}); "
        "set MQTT_CA_CERT to the CA that signed it"
    )


def _reason(exc: Exception) -> str:
    if isinstance(exc, ssl.SSLError):
        return (exc.reason or "no reason given").lower().replace("_", " ")
    return getattr(exc, "strerror", None) or str(exc) or type(exc).__name__
