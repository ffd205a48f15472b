"""The frozen text tower of the same CLIP: texts -> embeddings, in the space of the images' `embed`.

    ids = <start> w_1 ... w_n <end>                     (cut to the context as CLIP cuts: the end stays)
    x = blocks(token_embedding[ids] + positions)        (causal: a token sees none that follow)
    embedding = ln_final(x[<end>]) @ text_projection    (not normalised)

What follows the end of a text cannot reach it through the causal mask, so texts are computed at their own length and not at
that of the context: a class name of 6 tokens takes a twelfth of the time of 77. Checked against open_clip's own `encode_text`
and transformers'.

Prompts with learnt vectors (CoOp, Zhou et al. 2022) enter behind `token_embedding`: `embed_prompts` makes tokens with places
for the vectors, and `encode_embedded` does the rest, with gradients to the tokens.
"""

import gzip
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import open_clip
import torch
from jaxtyping import Float, Int
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor, nn

from vcache.extract.backbone import load_backbone
from vcache.extract.tower_weights import Checkpoint, check_activation, misfit, read_checkpoint, weights_sha256
from vcache.extract.weights import LOCAL_DIR, Architecture, NoTextTower, find_architecture, find_checkpoint

__all__ = ["EmbeddedPrompts", "FrozenTextTower", "NoTextTower", "check_text_tower", "load_text_tower", "text_width"]

VOCABULARY_FILES = "bpe*.txt.gz"
"""In a `local-dir:` folder: the merges of its tokenizer, in the form of the file that comes with open_clip."""
_CLIP_VOCABULARY = 49408
_MAX_VOCABULARY_BYTES = 2**25  # CLIP's own takes 3.2 MB; a small file may unpack to more than the memory holds
_BATCH = 128
_PLACE = "X"  # a word that is one token in every vocabulary of bytes
_WHAT_WORKS = (
    "vcache runs CLIP's own text transformer and byte-pair vocabulary (ViT-B-32, ViT-B-16, ViT-L-14 and their kind)"
)


@dataclass(frozen=True, eq=False)
class EmbeddedPrompts:
    """Prompts of K classes behind the token embedding, without positions: <start> X ... X name . <end> padding."""

    tokens: Float[Tensor, "K L W"]
    """Of width W; 1 to M are the places for learnt vectors, and hold the embedding of the word X."""
    ends: Int[Tensor, " K"]
    """Where <end> is."""


class FrozenTextTower(nn.Module):
    """A text tower in eval mode, without gradients, in float32."""

    model: str
    """As the image tower's `BackboneFacts.model`."""
    logit_scale: float
    """CLIP's parameter: logits are exp(logit_scale) times a cosine."""
    weights_sha256: str
    """Of the text tower and its logit scale."""

    def __init__(
        self,
        clip: open_clip.CLIP,
        architecture: Architecture,
        tokenizer: SimpleTokenizer,
        image_sha256: Callable[[], str],
    ) -> None:
        super().__init__()
        state = {name: tensor for name, tensor in clip.state_dict().items() if not name.startswith("visual.")}
        del clip.visual, clip.attn_mask  # the mask is made at the length of the texts
        self.clip = clip.requires_grad_(False).eval()
        self.model, self.embed_dim = architecture.name, architecture.embed_dim
        self.weights_sha256, self.logit_scale = weights_sha256(state), float(clip.logit_scale)
        self._tokenizer, self._image_sha256 = tokenizer, image_sha256

    @cached_property
    def visual_sha256(self) -> str:
        """`FrozenBackbone.weights_sha256` of the image tower in the same checkpoint, which is read when this is asked for."""
        return self._image_sha256()

    def train(self, mode: bool = True) -> "FrozenTextTower":
        """Stays in eval mode, also as a part of a model that is trained."""
        return super().train(False)

    def encode(self, texts: Sequence[str]) -> Float[Tensor, "n E"]:
        """The embedding of each text, not normalised, float32 on the CPU."""
        ids = [self._token_ids(text) for text in texts]
        embedded = torch.empty(len(ids), self.embed_dim)
        by_length = sorted(range(len(ids)), key=lambda row: len(ids[row]))
        for first in range(0, len(ids), _BATCH):
            rows = by_length[first : first + _BATCH]
            embedded[rows] = self._forward([ids[row] for row in rows]).cpu()
        return embedded

    def count_cut(self, texts: Sequence[str]) -> int:
        """How many of the texts are longer than the context, so that `encode` drops their last words."""
        return sum(len(self._tokenizer.encode(text)) + 2 > self.clip.context_length for text in texts)

    @torch.no_grad()
    def embed_prompts(self, words: Sequence[str], num_places: int) -> EmbeddedPrompts:
        """A prompt of the words of each class, with so many places before them, on the device of the tower.

        With the full stop that CoOp's code and Text4Vis's (modules/coop.py at d61b34d) put behind the name; eq. 7 of Text4Vis
        has none. Names are cut to the context as `encode` cuts.

        Raises:
            ValueError: the context has no room for so many places, a name and the two ends.
        """
        if not 0 < num_places <= self.clip.context_length - 3:
            raise ValueError(
                f"{num_places} learnt vectors before the class name: the text tower of {self.model} reads "
                f"{self.clip.context_length} tokens, which leaves room for 1 to {self.clip.context_length - 3}"
            )
        text = " ".join([_PLACE] * num_places)
        padded, ends = self._padded([self._token_ids(f"{text} {name}.") for name in words])
        return EmbeddedPrompts(self.clip.token_embedding(padded), ends)

    def encode_embedded(self, tokens: Float[Tensor, "n L W"], ends: Int[Tensor, " n"]) -> Float[Tensor, "n E"]:
        """The embedding of tokens behind the token embedding, not normalised; differentiable with respect to them.

        The last of the L tokens should be the end of a text: those behind all ends are computed for nothing.
        """
        clip, length = self.clip, tokens.shape[1]
        mask = torch.full((length, length), -torch.inf, device=tokens.device).triu(1)
        x = clip.transformer(tokens + clip.positional_embedding[:length], attn_mask=mask)
        x = x[torch.arange(len(ends), device=tokens.device), ends]
        return clip.ln_final(x) @ clip.text_projection

    def _token_ids(self, text: str) -> list[int]:
        start, end = self._tokenizer.sot_token_id, self._tokenizer.eot_token_id
        return [start, *self._tokenizer.encode(text)[: self.clip.context_length - 2], end]

    def _padded(self, ids: list[list[int]]) -> tuple[Int[Tensor, "n L"], Int[Tensor, " n"]]:
        """Tokens at the length of the longest text, and where each ends."""
        device, length = self.clip.positional_embedding.device, max(map(len, ids))
        padded = torch.tensor([row + [0] * (length - len(row)) for row in ids], device=device)
        return padded, torch.tensor([row.index(self._tokenizer.eot_token_id) for row in ids], device=device)

    @torch.no_grad()
    def _forward(self, ids: list[list[int]]) -> Tensor:
        padded, ends = self._padded(ids)
        return self.encode_embedded(self.clip.token_embedding(padded), ends)


def load_text_tower(
    model: str,
    pretrained: str | None,
    *,
    random_weights: bool = False,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> FrozenTextTower:
    """The text tower of the model that `load_backbone` loads the image tower of with the same arguments.

    Raises:
        NoTextTower: the model has none that vcache can run, its vocabulary is not there, or the checkpoint holds none that fits.
        RandomWeightsRefused, ActivationMismatch, UnsupportedBackbone: as `load_backbone`.
    """
    architecture = find_architecture(model, None if random_weights else pretrained)
    vocabulary = _check_supported(model, architecture)
    tokenizer = _tokenizer(vocabulary, architecture)
    if random_weights:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            clip = _build(architecture)
    else:
        with torch.device("meta"):  # neither memory nor random numbers for a tower that is filled or refused next
            clip = _build(architecture)
        _load(clip, architecture, read_checkpoint(find_checkpoint(model, pretrained, architecture), "text"))
    image = partial(_image_sha256, model, pretrained, random_weights, seed)
    return FrozenTextTower(clip, architecture, tokenizer, image).to(device)


def check_text_tower(model: str, pretrained: str | None) -> None:
    """Raise NoTextTower if `load_text_tower` would, as far as that can be known without reading weights."""
    _check_supported(model, find_architecture(model, pretrained))


def text_width(model: str, pretrained: str | None) -> int:
    """Channels of the tokens that the text tower of this model reads, without reading weights.

    Raises:
        NoTextTower: as `check_text_tower`.
    """
    architecture = find_architecture(model, pretrained)
    _check_supported(model, architecture)
    return int(open_clip.CLIPTextCfg(**architecture.text).width)


def _image_sha256(model: str, pretrained: str | None, random_weights: bool, seed: int) -> str:
    return load_backbone(model, pretrained, random_weights=random_weights, seed=seed).weights_sha256


def _check_supported(model: str, architecture: Architecture) -> Path | None:
    """The file of the vocabulary; None is the one that comes with open_clip."""
    name = architecture.name
    if not architecture.text:
        raise NoTextTower(f"{name}: its configuration has no text_cfg; {_WHAT_WORKS}.")
    try:
        config = open_clip.CLIPTextCfg(**architecture.text)
    except TypeError as error:
        raise NoTextTower(f"{name}: its text_cfg is not one of open_clip: {error}.") from error
    if odd := _departure(config):
        raise NoTextTower(f"{name}: its text tower has {odd}; {_WHAT_WORKS}.")
    vocabulary = _vocabulary_file(model)
    if vocabulary is None and config.vocab_size != _CLIP_VOCABULARY:
        mend = (
            f"Put the file of its merges into the folder as {VOCABULARY_FILES}"
            if model.startswith(LOCAL_DIR)
            else _WHAT_WORKS
        )
        raise NoTextTower(
            f"{name}: its text tower knows {config.vocab_size} tokens, and CLIP's vocabulary has {_CLIP_VOCABULARY}. {mend}."
        )
    return vocabulary


def _departure(config: open_clip.CLIPTextCfg) -> str:
    """What of a text tower `FrozenTextTower` does not compute; empty if it computes all of it."""
    departures: list[tuple[Any, str]] = [
        (config.hf_model_name, f"the transformer {config.hf_model_name} of Hugging Face"),
        (config.hf_tokenizer_name, f"the tokenizer {config.hf_tokenizer_name}, which would have to be downloaded"),
        (config.tokenizer_kwargs, "a tokenizer with settings of its own"),
        (config.embed_cls, "a class token"),
        (config.no_causal_mask, "no causal mask"),
        (config.pool_type != "argmax", f"the pooling {config.pool_type!r}, not that at the end of the text"),
        (config.proj_type != "linear" or config.proj_bias, "another projection than a matrix"),
    ]
    return next((words for departs, words in departures if departs), "")


def _vocabulary_file(model: str) -> Path | None:
    if not model.startswith(LOCAL_DIR):
        return None
    folder = Path(model.removeprefix(LOCAL_DIR)).expanduser()
    found = sorted(folder.glob(VOCABULARY_FILES))
    if len(found) > 1:
        raise NoTextTower(f"{folder} holds several vocabularies ({', '.join(path.name for path in found)}): leave one.")
    return found[0] if found else None


def _tokenizer(vocabulary: Path | None, architecture: Architecture) -> SimpleTokenizer:
    """Without a check open_clip gives ids that the embedding does not have, or has for other words."""
    tokenizer = _clip_tokenizer() if vocabulary is None else _tokenizer_of(vocabulary)
    wanted = open_clip.CLIPTextCfg(**architecture.text).vocab_size
    # A merge that is there twice leaves a hole in the ids.
    if not tokenizer.vocab_size == tokenizer.eot_token_id + 1 == wanted:
        raise NoTextTower(
            f"{architecture.name}: its text tower knows {wanted} tokens, and its vocabulary {vocabulary or 'of CLIP'} has "
            f"{tokenizer.vocab_size}."
        )
    return tokenizer


@cache
def _clip_tokenizer() -> SimpleTokenizer:
    return SimpleTokenizer()


def _tokenizer_of(vocabulary: Path) -> SimpleTokenizer:
    try:
        with gzip.open(vocabulary) as file:
            too_large = len(file.read(_MAX_VOCABULARY_BYTES)) == _MAX_VOCABULARY_BYTES
        tokenizer = None if too_large else SimpleTokenizer(bpe_path=str(vocabulary))
    except (OSError, EOFError, ValueError, zlib.error) as error:  # cut, no gzip, or no UTF-8
        raise NoTextTower(f"{vocabulary} cannot be read as a vocabulary: {error}.") from error
    if tokenizer is None:
        raise NoTextTower(f"{vocabulary} unpacks to more than {_MAX_VOCABULARY_BYTES >> 20} MB: it is no vocabulary.")
    return tokenizer


def _build(architecture: Architecture) -> open_clip.CLIP:
    smallest = open_clip.CLIPVisionCfg(layers=1, width=1, head_width=1, patch_size=1, image_size=1)
    return open_clip.CLIP(
        embed_dim=architecture.embed_dim,
        vision_cfg=smallest,  # open_clip has no public way to build the text tower alone
        text_cfg=open_clip.CLIPTextCfg(**architecture.text),
        quick_gelu=architecture.quick_gelu,
    )


def _load(clip: open_clip.CLIP, architecture: Architecture, checkpoint: Checkpoint) -> None:
    """Every weight of the tower from the checkpoint, and no weight left over."""
    check_activation(architecture, checkpoint)
    wanted = {name: tensor for name, tensor in clip.state_dict().items() if not name.startswith("visual.")}
    given = dict(checkpoint.weights)
    if "logit_scale" in given and given["logit_scale"].numel() == 1:
        given["logit_scale"] = given["logit_scale"].reshape(())  # some models keep it as a vector of one
    if differs := misfit(wanted, given):
        raise NoTextTower(f"{checkpoint.path} does not fit the text tower of {architecture.name}: weights {differs}.")
    clip.load_state_dict(given, strict=False, assign=True)
