"""`class_embeddings` of every head that has it: one row for each class, and those that its classifier really compares with."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import normalize

from vcache.heads.registry import get_head, list_heads
from vcache.heads.requirements import ClipFeatures
from vcache.heads.text import ClassText

COMPARED = [name for name, head in list_heads().items() if hasattr(head, "class_embeddings")]


def build(name: str, sizes, text: ClassText) -> torch.nn.Module:
    config = get_head(name).Config
    names = {field.name for field in dataclasses.fields(config)}
    facts = {
        "num_classes": sizes.K,
        "num_frames": sizes.T,
        "width": sizes.D,
        "num_heads": sizes.H,
        "embed_dim": sizes.E,
    }
    facts |= {"grid": (sizes.h, sizes.w), "patch_size": sizes.p, "num_layers": sizes.L}
    torch.manual_seed(2)
    head = get_head(name)(config(**{name: value for name, value in facts.items() if name in names}))
    if head.requires(head.config).text:
        head.set_text(text)
    return head.eval()


def test_the_heads_of_the_papers_have_it() -> None:
    assert {"actionclip", "dist", "evl", "linear", "text4vis"} <= {*COMPARED}


@pytest.mark.parametrize("name", COMPARED)
def test_there_is_a_row_for_each_class_and_none_is_like_another(name: str, sizes, class_text: ClassText) -> None:
    rows = build(name, sizes, class_text).class_embeddings()
    assert rows.shape[0] == sizes.K and rows.isfinite().all()
    cosines = normalize(rows, dim=1) @ normalize(rows, dim=1).T
    assert (cosines - torch.eye(sizes.K)).abs().max() < 0.999


@pytest.mark.parametrize("name", ["actionclip", "evl", "linear", "text4vis"])
def test_a_class_whose_row_is_anothers_cannot_be_told_from_it(
    name: str, sizes, class_text: ClassText, make_features: Callable[..., ClipFeatures]
) -> None:
    """So these are the rows that decide, and no copy of them; biases, where there are any, are taken out."""
    head, features = build(name, sizes, class_text), make_features(range(-4, 0))
    with torch.no_grad():
        if get_head(name).requires(head.config).text:
            text = class_text.embeddings.clone()
            text[1] = text[4]
            head.set_text(ClassText(text, class_text.logit_scale))
        else:
            head.class_embeddings()[1] = head.class_embeddings()[4]
            dict(head.named_parameters())["classify.bias" if name == "linear" else "proj.2.bias"].zero_()
        torch.testing.assert_close(head.class_embeddings()[1], head.class_embeddings()[4])
        logits = head(features)
    torch.testing.assert_close(logits[:, 1], logits[:, 4])
    assert (logits[:, 1] - logits[:, 2]).abs().min() > 1e-6


def test_of_several_templates_it_is_their_normalised_mean(sizes, class_text: ClassText) -> None:
    expected = normalize(normalize(class_text.embeddings, dim=2).sum(dim=1), dim=1)
    assert class_text.embeddings.shape[1] > 1
    for name in ("actionclip", "text4vis", "dist"):
        torch.testing.assert_close(build(name, sizes, class_text).class_embeddings(), expected)
