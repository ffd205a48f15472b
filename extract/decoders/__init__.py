"""Finds the decoders of this folder: a new decoder is one new file, named as the decoder is, with a `decoder` in it.

Nothing is imported before it is asked for: a decode process loads its own decoder and no other.
"""

import difflib
import importlib
import pkgutil
from abc import ABC, abstractmethod
from functools import cache

from vcache.extract.video import DecodedVideo, DecodeRequest


class DecoderError(ValueError):
    """A decoder that is not known, or not installed; the message says what to do."""


class Decoder(ABC):
    """Turns a request into frames. One thread a call; calls in several threads are independent of each other."""

    @abstractmethod
    def check_available(self) -> None:
        """Load the libraries.

        Raises:
            DecoderError: they are not installed or do not load, with the command that installs them.
        """

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """The decoder and the libraries that decide the pixels. Part of a cache's key: another version may give others."""

    @abstractmethod
    def decode(self, request: DecodeRequest) -> DecodedVideo:
        """Decode the frames of all clips of the request.

        Raises:
            VideoError: and nothing else, whatever the file.
        """


@cache
def list_decoders() -> tuple[str, ...]:
    """The names that `get_decoder` takes, in alphabetical order; not all of them need to be installed."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def get_decoder(name: str) -> Decoder:
    """The decoder of this name, ready to be used.

    Raises:
        DecoderError: there is none, or its libraries are not installed.
    """
    if name not in list_decoders():
        similar = difflib.get_close_matches(name.lower(), list_decoders(), n=1, cutoff=0.5)
        guess = f" Did you mean {similar[0]!r}?" if similar else ""
        raise DecoderError(f"decoder {name!r} is not known; there are: {', '.join(list_decoders())}.{guess}")
    decoder: Decoder = importlib.import_module(f"{__name__}.{name}").decoder
    decoder.check_available()
    return decoder
