"""Text encoders other than CLIP's own: any text model of Hugging Face, as DistilBERT in Table 1 of Text4Vis.

    h_1 ... h_L = last hidden states of the L tokens of a text, those that the tokenizer puts around it among them
    embedding   = mean of h_1 ... h_L        ("mean"; Text4Vis does not say how it pools)
                | h_1                        ("cls": the first token, which is that of BERT's kind)

Texts are computed beside others of their own length: none is padded, so no mask and no token for padding is needed. A model is a
folder with config.json, a tokenizer and .safetensors, or a name on the Hugging Face hub, of which only such files are downloaded.
Code and pickles of a model are never read. transformers is loaded when an encoder is, and not before.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vcache.extract.tower_weights import weights_sha256
from vcache.extract.weights import first_line

POOLINGS = ("mean", "cls")

_BATCH = 128
_FILES = ("*.json", "*.txt", "*.model", "*.safetensors")
_DEFAULT_CONTEXT = 512  # of a model that says none: class names are far from it
_POOLER = "pooler"
"""In the names of weights that no last hidden state depends on: where a checkpoint leaves them out, they are drawn."""


class TextEncoderError(ValueError):
    """The text encoder that was asked for cannot be had."""


class FrozenTextEncoder(nn.Module):
    """A text model in eval mode, without gradients, in float32."""

    source: str
    """What `load_text_encoder` finds it by from any folder: an absolute path, or a name on the hub."""
    name: str
    """Of the folder or on the hub, in letters, digits and '_'."""
    pooling: str
    """One of POOLINGS."""
    embed_dim: int
    context_length: int
    """Tokens that are read of a text."""
    weights_sha256: str
    """Of the weights that the embeddings depend on."""

    def __init__(self, model: nn.Module, tokenizer: Any, *, source: str, pooling: str) -> None:
        super().__init__()
        self.model, self._tokenizer = model.float().requires_grad_(False).eval(), tokenizer
        self.source, self.name, self.pooling = source, encoder_name(source), pooling
        self.context_length = _context_length(model, tokenizer)
        self.weights_sha256 = weights_sha256(
            {name: tensor for name, tensor in model.state_dict().items() if _POOLER not in name}
        )
        self.embed_dim = self._forward([self._token_ids("a")]).shape[1]

    def train(self, mode: bool = True) -> "FrozenTextEncoder":
        """Stays in eval mode, also as a part of a model that is trained."""
        return super().train(False)

    def encode(self, texts: Sequence[str]) -> Float[Tensor, "n E"]:
        """The embedding of each text, not normalised, float32 on the CPU."""
        ids = [self._token_ids(text) for text in texts]
        embedded = torch.empty(len(ids), self.embed_dim)
        by_length = sorted(range(len(ids)), key=lambda row: len(ids[row]))
        for _, group in itertools.groupby(by_length, key=lambda row: len(ids[row])):
            alike = list(group)
            for first in range(0, len(alike), _BATCH):
                rows = alike[first : first + _BATCH]
                embedded[rows] = self._forward([ids[row] for row in rows]).cpu()
        return embedded

    def count_cut(self, texts: Sequence[str]) -> int:
        """How many of the texts are longer than the context, so that `encode` drops their last words."""
        return sum(len(self._tokenizer(text, verbose=False)["input_ids"]) > self.context_length for text in texts)

    def tokens_sha256(self, texts: Sequence[str]) -> str:
        """Digest of what the tokenizer makes of the texts: other merges, words or cases show in it."""
        return hashlib.sha256(json.dumps([self._token_ids(text) for text in texts]).encode()).hexdigest()

    def _token_ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, truncation=True, max_length=self.context_length)["input_ids"])

    @torch.no_grad()
    def _forward(self, ids: list[list[int]]) -> Tensor:
        tokens = torch.tensor(ids, device=next(self.model.parameters()).device)  # (B, L)
        hidden = self.model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state
        return hidden.mean(dim=1) if self.pooling == "mean" else hidden[:, 0]


def encoder_name(source: str) -> str:
    """What an encoder is called in a store: "distilbert_base_uncased" of distilbert/distilbert-base-uncased or of such a folder.

    Raises:
        TextEncoderError: there is no letter in it.
    """
    last = Path(source).expanduser().resolve().name
    if not (name := re.sub(r"[^A-Za-z0-9]+", "_", last).strip("_")):
        raise TextEncoderError(f"--encoder {source} has no name to call its embeddings by. Name a folder that has one.")
    return name


def load_text_encoder(source: str, *, pooling: str = "mean", device: str | torch.device = "cpu") -> FrozenTextEncoder:
    """The text model in a folder, or of that name on the Hugging Face hub.

    Raises:
        TextEncoderError: transformers is not installed, or there is no such model, or none that vcache can run.
    """
    if pooling not in POOLINGS:
        raise TextEncoderError(f"--pooling {pooling}: there are {' and '.join(POOLINGS)}.")
    transformers = _transformers(source)
    folder = Path(source).expanduser()
    source, folder = (str(folder.absolute()), folder) if folder.is_dir() else (source, _downloaded(source))
    _check_files(folder)
    with _quiet(transformers), _explained(folder, "cannot be loaded as a text model of transformers"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model, found = transformers.AutoModel.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    two_parts = hasattr(model, "encoder") and hasattr(model, "decoder")  # T5's kind, of which the encoder is enough
    _check_weights(folder, [name for name in found["missing_keys"] if not (two_parts and name.startswith("decoder."))])
    with _explained(folder, f"holds {type(model).__name__}, which gives no hidden states of a text alone"):
        _check_vocabulary(folder, tokenizer, model)
        part = model.encoder if two_parts else model
        encoder = FrozenTextEncoder(part, tokenizer, source=source, pooling=pooling)
    return encoder.to(device)


def _transformers(source: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise TextEncoderError(
            f"--encoder {source} needs the package transformers ({first_line(error)}). Install it with:  pip install transformers"
        ) from error
    return transformers


def _downloaded(name: str) -> Path:
    """The folder of a model of the hub, in the cache of its client."""
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise TextEncoderError(f"--encoder {name}: there is no such folder.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(_FILES)))
    # The client, its transport and its cache raise many kinds.
    except Exception as error:
        raise TextEncoderError(
            f"--encoder {name}: there is no such folder, and no model of that name could be downloaded from the Hugging Face hub "
            f"({first_line(error)})."
        ) from error


def _check_files(folder: Path) -> None:
    """Raise TextEncoderError where transformers would ask the hub, or make up what is not there."""
    if not (folder / "config.json").is_file():
        raise TextEncoderError(f"{folder} holds no config.json: it is no model of transformers.")
    if any(folder.glob("model*.safetensors*")):
        return
    others = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".h5", ".msgpack"))
    beside = f"only {', '.join(others)}, which vcache does not read" if others else "no weights"
    raise TextEncoderError(
        f"{folder} holds {beside}: it takes model.safetensors, as transformers' save_pretrained(FOLDER) writes it."
    )


def _check_weights(folder: Path, missing: Sequence[str]) -> None:
    """transformers draws at random what a checkpoint lacks, and says so in its log alone."""
    if lacking := sorted(name for name in missing if _POOLER not in name):
        raise TextEncoderError(
            f"{folder} lacks {len(lacking)} of the weights that its config.json asks for, as {lacking[0]}: they would be random."
        )


def _check_vocabulary(folder: Path, tokenizer: Any, model: Any) -> None:
    """A folder without a tokenizer gives one that knows no word."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise TextEncoderError(
            f"{folder} holds no vocabulary: put its tokenizer there (tokenizer.json, or vocab.txt and what goes with it)."
        )
    if len(tokenizer) > rows:
        raise TextEncoderError(f"{folder}: its tokenizer has {len(tokenizer)} tokens, and its model knows {rows}.")


def _context_length(model: Any, tokenizer: Any) -> int:
    told = (tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None))
    return min((int(length) for length in told if length and length < 10**6), default=_DEFAULT_CONTEXT)


@contextmanager
def _explained(folder: Path, what: str) -> Iterator[None]:
    """Damaged and foreign folders make transformers raise nearly anything."""
    try:
        yield
    except TextEncoderError:
        raise
    except Exception as error:
        raise TextEncoderError(f"{folder} {what}: {first_line(error)}.") from error


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Neither bars nor reports of loading: what of them matters is an error here."""
    logging = transformers.utils.logging
    level, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if had_bars:
            logging.enable_progress_bar()
