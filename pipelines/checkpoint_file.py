"""Opens a checkpoint that somebody else wrote, without running any code that is in it."""

import errno
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

_AGAIN = "Download it again."


class CheckpointError(ValueError):
    """A file that is no checkpoint that can be read; says what it is, as far as that can be told."""


def read_checkpoint_file(path: Path) -> Any:
    """What torch.save or safetensors wrote: tensors on the CPU in plain containers. By its content, not by its name.

    Raises:
        CheckpointError: it is not there, cut off, damaged or something else, or reading it would run code.
        OSError: it may not be read.
    """
    if not path.is_file():
        there = "is a folder" if path.is_dir() else "is not there"
        raise CheckpointError(f"{path} {there}. Give the checkpoint's file, as downloaded.")
    with path.open("rb") as file:
        head = file.read(512)
    if reason := _not_a_checkpoint(head):
        raise CheckpointError(f"{path} {reason}")
    try:
        return load_file(path) if head[8:9] == b"{" else _load_torch(path, head)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} {_why_not_unpickled(path, error)}") from error
    # Of a file that is cut off or something else the readers raise nearly anything.
    except Exception as error:
        # torch seeks to before the start of some, which is EINVAL.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise CheckpointError(
            f"{path} is cut off, damaged or no checkpoint: {_first_sentence(error)}. {_AGAIN}"
        ) from error


def _load_torch(path: Path, head: bytes) -> Any:
    if head.startswith(b"PK") and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise CheckpointError(
                    f"{path} is a TorchScript archive, as OpenAI publishes CLIP: a backbone, for "
                    "`vcache extract --pretrained`, and not a head."
                )
            # torch itself reads flipped bits as weights.
            if damaged := archive.testzip():
                raise CheckpointError(f"{path} is damaged: the checksum of {damaged} in it does not fit. {_AGAIN}")
    # By its path torch would go by its name. Warnings are of foreign pickle protocols; what cannot be read raises.
    with warnings.catch_warnings(), path.open("rb") as file:
        warnings.simplefilter("ignore")
        return torch.load(file, map_location="cpu", weights_only=True)


def _not_a_checkpoint(head: bytes) -> str | None:
    """What a file of these first bytes is, if that is no checkpoint."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return f"is empty. {_AGAIN}"
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return (
            "is a web page and no checkpoint: that is what Google Drive gives to a program that does not confirm its "
            "question. Download it in a browser."
        )
    if head.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS and no checkpoint. Fetch the file with:  git lfs pull"
    if head[257:262] == b"ustar":
        return (
            "is a .tar, as torch wrote checkpoints until 2017: reading it would run code that it may hold, and vcache runs none. "
            "If you trust it, load it and save its state dict with a current torch."
        )
    return None


def _why_not_unpickled(path: Path, error: pickle.UnpicklingError) -> str:
    """torch's own advice, to load it with its safety off, is left out."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    # A file that ends within a name asks for what is there of it, less the last letter, which is taken for the end of line.
    name = found[1].rpartition(".")[2].encode() if found else b""
    if found is None or name in path.read_bytes()[-1 - len(name) :]:
        return f"is cut off, damaged or no checkpoint: it holds no pickle of weights. {_AGAIN}"
    return (
        f"holds {found[1]}, which only running code of the file could make, and vcache runs none. If you trust it, save "
        'its state dict alone:  torch.save({"model": state_dict}, FILE)'
    )


def _first_sentence(error: Exception) -> str:
    # Of bytes that are no pickle torch's unpickler raises the KeyError of a number, which says nothing.
    if isinstance(error, KeyError):
        return "it holds no pickle of weights"
    return (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0][:200].rstrip(".")
