"""Python objects over a socket between a decode process and its parent: a mark, a length, a pickle.

Pickle runs code of whoever writes it, so this is for the two ends of one socket pair and for nothing else.
"""

import pickle
import socket
import struct
from collections.abc import Callable
from typing import Any

_HEADER = struct.Struct("<4sI")
_MARK = b"vcd1"
_MAX_BYTES = 64 * 2**20  # frames do not come this way: a request or an answer is a few thousand bytes


class GarbledMessage(Exception):
    """What came is not a message: the process at the other end is no longer itself."""


def send_message(link: socket.socket, message: object) -> None:
    """Send one object; blocks until it is on its way.

    Raises:
        OSError: the other end is gone.
    """
    payload = pickle.dumps(message)
    link.sendall(_HEADER.pack(_MARK, len(payload)) + payload)


def receive_message(link: socket.socket, wait: Callable[[], None] = lambda: None) -> Any:
    """The next object. `wait` is called before every read, and may raise to give up.

    Raises:
        EOFError: the other end closed, or died.
        GarbledMessage: something else than a message came.
    """
    mark, size = _HEADER.unpack(_read(link, _HEADER.size, wait))
    if mark != _MARK or size > _MAX_BYTES:
        raise GarbledMessage
    payload = _read(link, size, wait)
    try:
        return pickle.loads(payload)
    except Exception as error:
        raise GarbledMessage from error


def _read(link: socket.socket, size: int, wait: Callable[[], None]) -> bytes:
    data = bytearray()
    while len(data) < size:
        wait()
        try:
            part = link.recv(size - len(data))
        except ConnectionError as error:  # it died with something of ours unread
            raise EOFError from error
        if not part:
            raise EOFError
        data += part
    return bytes(data)
