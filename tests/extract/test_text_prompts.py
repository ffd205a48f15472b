"""Prompts with learnt vectors through the frozen text tower, against open_clip's own at its full length."""

from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from vcache.extract.text import FrozenTextTower, NoTextTower, load_text_tower, text_width

WORDS = ["wave", "an ore", "a", "clap hands and jump"]
"""The last is longer than the context of 11 with what stands around it."""
M, CONTEXT, WIDTH = 2, 11, 24


@pytest.fixture(scope="module")
def tower(worded_clip: Path) -> FrozenTextTower:
    return load_text_tower(f"local-dir:{worded_clip}", None)


@pytest.fixture(scope="module")
def model(worded_clip: Path) -> open_clip.CLIP:
    return open_clip.create_model(f"local-dir:{worded_clip}").eval()


@pytest.fixture(scope="module")
def ids(worded_clip: Path) -> Tensor:
    """Of the prompts with words in the place of vectors, as open_clip cuts and pads them."""
    tokenizer = SimpleTokenizer(bpe_path=str(worded_clip / "bpe_tiny.txt.gz"), context_length=CONTEXT)
    return tokenizer([f"X X {name}." for name in WORDS])


def filled(tokens: Tensor, context: Tensor) -> Tensor:
    return torch.cat([tokens[:, :1], context.expand(len(tokens), -1, -1), tokens[:, 1 + M :]], dim=1)


def official(model: open_clip.CLIP, ids: Tensor, context: Tensor) -> Tensor:
    """CoOp's TextEncoder: modules/coop.py of whwu95/Text4Vis, written with open_clip's modules and mask."""
    x = filled(model.token_embedding(ids), context) + model.positional_embedding
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask))
    return x[torch.arange(len(ids)), ids.argmax(dim=-1)] @ model.text_projection


def test_with_words_in_the_places_the_embeddings_are_those_of_open_clip(
    tower: FrozenTextTower, model: open_clip.CLIP, ids: Tensor
) -> None:
    prompts = tower.embed_prompts(WORDS, M)
    with torch.no_grad():
        expected = model.encode_text(ids)
    torch.testing.assert_close(tower.encode_embedded(prompts.tokens, prompts.ends), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tower.encode([f"X X {name}." for name in WORDS]), expected, rtol=1e-5, atol=1e-6)
    assert prompts.ends.tolist() == ids.argmax(dim=-1).tolist() and max(prompts.ends) == CONTEXT - 1


def test_embeddings_and_gradients_of_vectors_are_those_of_the_whole_tower(
    tower: FrozenTextTower, model: open_clip.CLIP, ids: Tensor
) -> None:
    torch.manual_seed(3)
    ours = torch.randn(M, WIDTH).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    towards = torch.randn(len(WORDS), tower.embed_dim)
    prompts = tower.embed_prompts(WORDS, M)
    got, expected = (
        tower.encode_embedded(filled(prompts.tokens, ours), prompts.ends),
        official(model, ids, theirs),
    )
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    (got * towards).sum().backward()
    (expected * towards).sum().backward()
    assert ours.grad is not None and ours.grad.abs().min() > 0
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    assert [name for name, parameter in tower.named_parameters() if parameter.grad is not None] == []


def test_a_prompt_has_its_embedding_at_its_own_length_and_beside_longer_ones(tower: FrozenTextTower) -> None:
    together = tower.embed_prompts(WORDS, M)
    alone = tower.embed_prompts(WORDS[2:3], M)
    assert alone.tokens.shape == (1, M + 4, WIDTH) != together.tokens.shape  # start, two places, "a", ".", end
    torch.testing.assert_close(
        tower.encode_embedded(alone.tokens, alone.ends),
        tower.encode_embedded(together.tokens, together.ends)[2:3],
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("num_places", [0, CONTEXT - 2])
def test_a_context_without_room_for_a_name_is_refused(tower: FrozenTextTower, num_places: int) -> None:
    assert tower.embed_prompts(["a"], CONTEXT - 3).tokens.shape[1] == CONTEXT
    with pytest.raises(ValueError, match=f"^{num_places} learnt vectors .* reads 11 tokens, .* room for 1 to 8$"):
        tower.embed_prompts(["a"], num_places)


def test_the_width_is_known_before_any_weight(worded_clip: Path, tiny_clip: Path) -> None:
    assert text_width(f"local-dir:{worded_clip}", None) == WIDTH
    assert (text_width("ViT-B-16", None), text_width("RN50x4", None), text_width("ViT-L-14", None)) == (512, 640, 768)
    with pytest.raises(NoTextTower):
        text_width(f"local-dir:{tiny_clip}", None)
