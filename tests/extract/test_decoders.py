"""The registry of decoders: found by name, loaded when asked for, and refused in words."""

import subprocess
import sys
from pathlib import Path

import pytest

from vcache.extract.decode import decode_video, decoder_versions
from vcache.extract.decoders import DecoderError, get_decoder, list_decoders
from vcache.extract.sampling import ClipRule, TSNSampling
from vcache.extract.video import DecodeRequest


def test_decoders_are_the_files_of_the_folder() -> None:
    folder = Path(sys.modules["vcache.extract.decoders"].__file__ or "").parent
    assert list_decoders() == tuple(sorted(file.stem for file in folder.glob("[!_]*.py")))
    assert "pyav" in list_decoders()


def test_versions_begin_with_the_name_of_the_decoder() -> None:
    assert decoder_versions() == get_decoder("pyav").versions()
    assert next(iter(decoder_versions().items())) == ("decoder", "pyav")


def test_unknown_decoder_is_named_with_the_nearest_one() -> None:
    with pytest.raises(
        DecoderError, match=r"decoder 'PyAv2' is not known; there are: .*pyav.*\. Did you mean 'pyav'\?"
    ):
        get_decoder("PyAv2")
    request = DecodeRequest(path=Path("a.mp4"), clips=(ClipRule(sampling=TSNSampling()),), decoder="ffmpeg")
    with pytest.raises(DecoderError, match="'ffmpeg' is not known"):
        decode_video(request)


def test_naming_a_decoder_loads_none() -> None:
    """A request is made in the parent of the decode processes, which has no use for FFmpeg."""
    code = (
        "import sys; from vcache.extract import decode, video; from vcache.extract.decoders import list_decoders;"
        "list_decoders(); print([m for m in ('av', 'decord', 'torch', 'torchcodec', 'PIL') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
