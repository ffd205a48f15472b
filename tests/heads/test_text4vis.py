"""The Text4Vis head against the official modules (goldens made at d61b34d), and its classifiers."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, normalize

from vcache.heads.offline_classifiers import span_projection
from vcache.heads.requirements import ClipFeatures, HeadRequirements
from vcache.heads.text import ClassText
from vcache.heads.text4vis import Text4Vis

GOLDENS = Path(__file__).parents[1] / "goldens"
TOLERANCE = {"rtol": 1e-5, "atol": 2e-5}
TEMPORAL = {"None": "tap", "Transf": "t_trans"}


def load_golden(name: str) -> tuple[Text4Vis, ClipFeatures, dict[str, Tensor], Tensor]:
    """The head with the golden's weights and text, its features, all arrays of the golden, and the labels."""
    facts = json.loads((GOLDENS / f"{name}.json").read_text())
    with np.load(GOLDENS / f"{name}.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    config = Text4Vis.Config(
        num_classes=facts["num_classes"],
        embed_dim=facts["embed_dim"],
        temporal=TEMPORAL[facts["head"]],
        temporal_heads=facts.get("heads"),
    )
    head = Text4Vis(config).eval()
    prefix = "w/fusion_model."
    head.fusion_model.load_state_dict(
        {key.removeprefix(prefix): x for key, x in arrays.items() if key.startswith(prefix)}
    )
    head.set_text(ClassText(arrays["in/text_emb"][:, None], arrays["w/logit_scale"].item()))
    return head, ClipFeatures(embed=arrays["in/frame_emb"]), arrays, torch.tensor(facts["labels"])


def check_gradients(head: Text4Vis, arrays: dict[str, Tensor], prefix: str, least: int) -> None:
    names = {"logit_scale": "classifier.logit_scale"}
    found = {name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)}
    found = {name: x for name, x in found.items() if not name.startswith("ce/")}
    assert len(found) >= least
    for name, expected in found.items():
        torch.testing.assert_close(head.get_parameter(names.get(name, name)).grad, expected, **TOLERANCE)


@pytest.mark.parametrize(("name", "num_gradients"), [("text4vis_none", 0), ("text4vis_transf", 3)])
def test_embeddings_logits_loss_and_gradients_equal_the_official_ones(name: str, num_gradients: int) -> None:
    head, features, arrays, labels = load_golden(name)
    embedding = head.embed(features)
    torch.testing.assert_close(embedding, arrays["out/video_emb"], **TOLERANCE)
    torch.testing.assert_close(head(features), arrays["out/eval_logits"], **TOLERANCE)
    if num_gradients:
        embedding.square().sum().backward()
        check_gradients(head, arrays, "grad/", num_gradients)
    head.zero_grad()
    head.train()
    logits = head(features)
    torch.testing.assert_close(logits, arrays["out/logits"], **TOLERANCE)
    loss = cross_entropy(logits, labels)
    torch.testing.assert_close(loss, arrays["out/ce"], **TOLERANCE)
    loss.backward()
    check_gradients(head, arrays, "grad/ce/", num_gradients + 1)


B, T, K, M, E = 3, 4, 6, 2, 10


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(**fields: object) -> Text4Vis:
    torch.manual_seed(2)
    return Text4Vis(Text4Vis.Config(**{"num_classes": K, "embed_dim": E, "temporal": "tap", **fields}))  # type: ignore[arg-type]


def class_text(num_classes: int = K, width: int = E, seed: int = 1, templates: int = M) -> ClassText:
    return ClassText(draw(num_classes, templates, width, seed=seed), 3.0)


FEATURES = ClipFeatures(embed=draw(B, T, E))


@pytest.mark.parametrize("width", [512, 768])
def test_the_transformer_has_the_papers_parameters(width: int) -> None:
    with torch.device("meta"):
        head = Text4Vis(Text4Vis.Config(num_classes=400, embed_dim=width))
    counted = sum(p.numel() for p in head.parameters())
    assert counted == {512: 18_953_728, 768: 42_586_368}[width] + 1  # the scale
    assert head.config.num_temporal_heads == width // 64


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, HeadRequirements(embed=True, text="text4vis")),
        ({"templates": "label"}, HeadRequirements(embed=True, text="label")),
        (
            {"training_templates": "clip_kinetics"},
            HeadRequirements(embed=True, text="text4vis", training_text="clip_kinetics"),
        ),
        ({"classifier": "random"}, HeadRequirements(embed=True)),
        ({"classifier": "learned"}, HeadRequirements(embed=True)),
        ({"classifier": "lda"}, HeadRequirements(embed=True, fitted_on=60)),
        ({"classifier": "lda", "lda_videos": 7}, HeadRequirements(embed=True, fitted_on=7)),
    ],
)
def test_it_reads_embeddings_and_what_its_classifier_is_made_of(
    fields: dict[str, object], expected: HeadRequirements
) -> None:
    assert Text4Vis.requires(make(**fields).config) == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temporal_heads": 3}, "embed_dim (10) must be a multiple of its 3 temporal_heads"),
        ({"temporal_heads": 0}, "temporal_heads (0) must be at least 1"),
        ({"lda_videos": 0}, "lda_videos (0) must be at least 1"),
        ({"lda_shrinkage": 1.5}, "lda_shrinkage (1.5) must be in [0, 1]"),
        ({"initial_logit_scale": math.nan}, "initial_logit_scale (nan) must be a number"),
        ({"classifier": "orthogonal", "num_classes": 11}, "cannot have 11 rows of 10 channels"),
        ({"classifier": "lda", "training_templates": "label"}, "need classifier 'text', frozen"),
        ({"frozen": False, "training_templates": "label"}, "need classifier 'text', frozen"),
    ],
)
def test_a_config_that_means_nothing_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        make(**fields)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "known"),
    [("temporal", "'t_trans', 'tap', 't1d'"), ("classifier", "'text', 'random', 'orthogonal', 'lda', 'learned'")],
)
def test_a_choice_that_is_not_there_is_refused_with_those_that_are(setting: str, known: str) -> None:
    config = make().config
    object.__setattr__(config, setting, "2d")  # the type checker of the tests refuses it on the way in
    with pytest.raises(ValueError, match=rf"{setting} \('2d'\) must be one of {known}"):
        config.__post_init__()


@given(num_classes=st.integers(1, 20), extra=st.integers(0, 12), seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_orthogonal_rows_are_orthonormal(num_classes: int, extra: int, seed: int) -> None:
    torch.manual_seed(seed)
    config = Text4Vis.Config(
        num_classes=num_classes,
        embed_dim=num_classes + extra,
        temporal="tap",
        temporal_heads=1,
        classifier="orthogonal",
    )
    rows = Text4Vis(config).classifier.embeddings
    torch.testing.assert_close(rows @ rows.mT, torch.eye(num_classes), rtol=0, atol=1e-5)


def test_random_rows_have_directions_that_are_spread_evenly_and_come_from_the_seed() -> None:
    torch.manual_seed(0)
    head = Text4Vis(Text4Vis.Config(num_classes=3000, embed_dim=E, temporal="tap", classifier="random"))
    rows = head.classifier.embeddings
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(3000))
    torch.testing.assert_close(rows.mT @ rows / 3000, torch.eye(E) / E, rtol=0, atol=0.02)
    assert rows.mean(dim=0).abs().max() < 0.03
    one, other = make(classifier="random"), make(classifier="random")
    assert torch.equal(one.classifier.embeddings, other.classifier.embeddings)


@pytest.mark.parametrize("classifier", ["text", "random", "orthogonal", "lda", "learned"])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("temporal", ["t_trans", "tap", "t1d"])
def test_what_is_trained_gets_gradients_and_what_is_fixed_stays(classifier: str, frozen: bool, temporal: str) -> None:
    head = given_head(classifier, frozen=frozen, temporal=temporal)
    before = head.classifier.embeddings.detach().clone()
    named = dict(head.named_parameters())
    assert ("classifier.embeddings" in named) == (classifier == "learned" or not frozen)
    optimiser = torch.optim.AdamW(named.values(), lr=0.1)
    cross_entropy(head(FEATURES), torch.tensor([0, 4, 2])).backward()
    assert all(p.grad is not None and p.grad.any() for p in named.values() if p.requires_grad)
    optimiser.step()
    assert torch.equal(head.classifier.embeddings, before) == ("classifier.embeddings" not in named)


def given_head(classifier: str, **fields: object) -> Text4Vis:
    """With all that it asks for, in training."""
    head = make(classifier=classifier, **fields)
    if classifier == "text":
        head.set_text(class_text())
    if classifier == "lda":
        head.fit([(ClipFeatures(embed=draw(4 * K, T, E, seed=7)), torch.arange(4 * K) % K)])
    return head.train()


@pytest.mark.parametrize("classifier", ["text", "random", "orthogonal", "lda", "learned"])
def test_a_state_dict_classifies_without_what_the_classifier_was_made_of(classifier: str) -> None:
    head = given_head(classifier).eval()
    torch.manual_seed(9)
    other = Text4Vis(head.config).eval()
    other.load_state_dict(head.state_dict())
    torch.testing.assert_close(other(FEATURES), head(FEATURES), rtol=0, atol=0)


def test_the_scale_starts_at_that_of_the_text_or_where_it_is_said_and_evaluation_takes_100() -> None:
    assert given_head("text").classifier.logit_scale.item() == 3.0
    assert given_head("random").classifier.logit_scale.item() == pytest.approx(math.log(100))
    assert given_head("lda").classifier.logit_scale.item() == pytest.approx(math.log(100))
    for classifier in ("text", "random", "lda"):
        head = given_head(classifier, initial_logit_scale=1.25)
        assert head.classifier.logit_scale.item() == 1.25
        expected = cosine_similarity(head.embed(FEATURES)[:, None], head.classifier.embeddings[None], dim=-1)
        torch.testing.assert_close(head(FEATURES), math.exp(1.25) * expected, **TOLERANCE)
        torch.testing.assert_close(head.eval()(FEATURES), 100 * expected, rtol=1e-5, atol=1e-4)


def test_discriminant_rows_find_the_class_of_clips_like_those_they_were_fitted_on() -> None:
    """In batches of different sizes; a clip is the mean of its frames."""
    labels, centres = torch.arange(60) % K, draw(K, 1, E, seed=3)
    frames = draw(60, T, E, seed=4) + 2 * centres[labels]
    head = make(classifier="lda").eval()
    head.fit([(ClipFeatures(embed=frames[a:b]), labels[a:b]) for a, b in ((0, 25), (25, 59), (59, 60))])
    rows = head.classifier.embeddings.clone()
    assert (head(ClipFeatures(embed=frames - frames.mean(dim=(0, 1)))).argmax(dim=1) == labels).float().mean() > 0.9
    head.fit([(ClipFeatures(embed=frames.flip(1).half()), labels)])
    torch.testing.assert_close(head.classifier.embeddings, rows, rtol=0.02, atol=0.02)


def test_other_classes_can_be_named_after_training_and_the_scale_stays() -> None:
    head = given_head("text")
    head.classifier.logit_scale.data.fill_(2.5)
    text = class_text(K + 3, seed=8)
    head.set_text(text)
    mean = normalize(text.embeddings, dim=-1).mean(dim=1)
    expected = 100 * cosine_similarity(head.embed(FEATURES)[:, None], mean[None], dim=-1)
    torch.testing.assert_close(head.eval()(FEATURES), expected, rtol=1e-5, atol=1e-4)
    assert head.classifier.logit_scale.item() == 2.5


def test_training_draws_one_template_a_step_and_evaluation_does_not() -> None:
    head = given_head("text", training_templates="many")
    many = class_text(templates=5, seed=11)
    head.set_training_text(many)
    embedding, scale = head.embed(FEATURES), math.exp(3.0)
    of_each = scale * torch.stack(
        [cosine_similarity(embedding[:, None], many.embeddings[None, :, m], dim=-1) for m in range(5)]
    )
    drawn = []
    for _ in range(60):
        logits = head(FEATURES)
        drawn.append(int((of_each - logits).abs().amax(dim=(1, 2)).argmin()))
        torch.testing.assert_close(logits, of_each[drawn[-1]], **TOLERANCE)
    assert set(drawn) == set(range(5))
    plain = given_head("text").eval()
    torch.testing.assert_close(head.eval()(FEATURES), plain(FEATURES), rtol=0, atol=0)
    assert head.state_dict().keys() == plain.state_dict().keys()  # a run is evaluated without them


@given(num_classes=st.integers(1, 12), wide=st.integers(1, 24), width=st.integers(1, 14), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_a_projection_keeps_inner_products_where_it_can(num_classes: int, wide: int, width: int, seed: int) -> None:
    rows = draw(num_classes, wide, seed=seed).double()
    projection = span_projection(rows, width)
    assert projection.shape == (wide, width)
    found, expected = (rows @ projection) @ (rows @ projection).mT, rows @ rows.mT
    if min(num_classes, wide) <= width:
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    else:  # the best approximation of that rank, as its eigenvalues say
        lost = torch.linalg.eigvalsh(expected)[: num_classes - width].clamp(min=0)
        torch.testing.assert_close((expected - found).norm(), lost.norm(), rtol=1e-6, atol=1e-9)
    columns = projection[:, : min(wide, width)]
    torch.testing.assert_close(columns.mT @ columns, torch.eye(columns.shape[1]).double(), rtol=0, atol=1e-9)
    assert not projection[:, wide:].any()


def test_text_of_another_width_keeps_the_angles_between_classes_and_stays_with_the_head() -> None:
    head, wide = make(), class_text(width=2 * E + 1)
    head.set_text(wide)
    mean = normalize(normalize(wide.embeddings, dim=-1).mean(dim=1), dim=-1)
    rows = head.classifier.embeddings
    torch.testing.assert_close(rows @ rows.mT, mean @ mean.mT, **TOLERANCE)
    projection = head.text_projection
    assert projection is not None
    head.set_text(class_text(K + 1, width=2 * E + 1, seed=5))
    assert head.text_projection is projection  # made once
    head.set_text(wide)
    other = make().eval()
    other.load_state_dict(head.state_dict())
    torch.testing.assert_close(other(FEATURES), head.eval()(FEATURES), rtol=0, atol=0)
    other.set_text(wide)
    torch.testing.assert_close(other.classifier.embeddings, rows, **TOLERANCE)
    with pytest.raises(ValueError, match=r"have 10 channels, those that were given before have 21"):
        other.set_text(class_text())
    other.set_training_text(class_text(width=2 * E + 1, seed=6, templates=3))
    assert other.train()(FEATURES).shape == (B, K)


def test_an_adapter_starts_as_nothing_and_is_all_that_is_trained_of_a_mean() -> None:
    features, text = ClipFeatures(embed=torch.randn(3, 4, 16)), ClassText(torch.randn(5, 1, 16), 4.6)
    plain, adapted = (
        Text4Vis(Text4Vis.Config(num_classes=5, embed_dim=16, temporal="tap", adapter=adapter))
        for adapter in (False, True)
    )
    for head in (plain, adapted):
        head.set_text(text)
    torch.testing.assert_close(adapted(features), plain(features), rtol=1e-6, atol=1e-6)
    assert {name for name, p in adapted.named_parameters() if p.requires_grad} - {
        name for name, p in plain.named_parameters()
    } == {"adapter.weight", "adapter.bias"}
