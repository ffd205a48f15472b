"""Classifiers on a tail, each against what it is said to be of the outputs of the blocks."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from vcache.heads.evl import EVL, EVLDecoderLayer
from vcache.heads.finetune_top import FinetuneTop
from vcache.heads.registry import get_head
from vcache.heads.requirements import ClipFeatures
from vcache.heads.text import ClassText, mean_of_templates

SETTINGS = {"blocks": 3, "train_blocks": False}


@pytest.fixture
def features(make_features) -> ClipFeatures:
    return make_features(range(-4, 0))


def outputs_of(tail, x: torch.Tensor) -> list[torch.Tensor]:
    """What leaves each block of the tail, the lowest first."""
    outputs = []
    for block in tail.top(len(tail.blocks)):
        outputs.append(x := block(x))
    return outputs


def test_linear_is_a_layer_on_the_mean_of_the_normed_cls(on_tail, features, frozen_tail):
    head = on_tail("finetune-top", **SETTINGS)
    cls = frozen_tail.ln_post(outputs_of(frozen_tail, features.stem)[-1][:, :, 0])
    linear = head.classifier.fc_cls
    torch.testing.assert_close(head(features), cls.mean(dim=1) @ linear.weight.T + linear.bias)


def test_st_adapter_takes_the_mean_before_the_norm(on_tail, features, frozen_tail):
    head = on_tail("st-adapter", blocks=3)  # its adapters start as nothing
    cls = frozen_tail.ln_post(outputs_of(frozen_tail, features.stem)[-1][:, :, 0].mean(dim=1))
    linear = head.classifier.fc_cls
    torch.testing.assert_close(head(features), cls @ linear.weight.T + linear.bias)


@pytest.mark.parametrize("name", ["aim", "st-adapter", "finetune-top"])
def test_text_starts_as_zero_shot_clip(on_tail, features, frozen_tail, class_text, name):
    head = on_tail(name, classifier="text", blocks=3)
    videos = frozen_tail.embed(features.stem, 3).mean(dim=1)
    cosines = cosine_similarity(videos[:, None], mean_of_templates(class_text.embeddings)[None], dim=-1)
    torch.testing.assert_close(head(features), 100 * cosines, rtol=1e-4, atol=1e-4)
    assert head.requires(head.config).by_name and head.view_average == "embeddings"


def test_text_is_trained_with_its_scale_and_a_projection_where_blocks_are(on_tail, features, class_text):
    head = on_tail("finetune-top", classifier="text")
    trained = {name for name, p in head.named_parameters() if p.requires_grad and not name.startswith("blocks.")}
    assert trained == {"ln_post.weight", "ln_post.bias", "classifier.text.logit_scale", "classifier.proj"}
    evaluated = head(features)
    torch.testing.assert_close(
        head.train()(features), evaluated * torch.tensor(class_text.logit_scale).exp() / 100, rtol=1e-4, atol=1e-5
    )


def test_text_tells_other_classes_apart_than_it_was_made_for(on_tail, features, sizes, class_text):
    head = on_tail("finetune-top", classifier="text")
    several = head(features)
    head.set_text(ClassText(class_text.embeddings[[4, 1]], class_text.logit_scale))
    torch.testing.assert_close(head(features), several[:, [4, 1]])


def test_evl_is_the_evl_head_on_the_last_outputs(on_tail, features, sizes, frozen_tail):
    head = on_tail("finetune-top", classifier="evl", decoder_layers=2, drawn=True, **SETTINGS)
    config = EVL.Config(
        num_classes=sizes.K,
        num_frames=sizes.T,
        width=sizes.D,
        num_heads=sizes.H,
        grid=(sizes.h, sizes.w),
        layers=(-2, -1),
        temporal_cross_attention=False,
    )
    evl = EVL(config).eval()
    evl.decoder.load_state_dict(head.classifier.decoder.state_dict())
    evl.proj[0].load_state_dict(head.classifier.norm.state_dict())
    evl.proj[2].load_state_dict(head.classifier.fc_cls.state_dict())
    tokens = dict(zip((-2, -1), outputs_of(frozen_tail, features.stem)[-2:], strict=True))
    torch.testing.assert_close(head(features), evl(ClipFeatures(tokens=tokens)))


def test_evl_gives_trained_blocks_the_gradients_of_its_plain_formulation(on_tail, features):
    head = on_tail("finetune-top", classifier="evl", decoder_layers=2, drawn=True, blocks=3)
    got = torch.autograd.grad(head(features).square().sum(), head.blocks.parameters())
    for layer in head.classifier.decoder.decoder_layers:
        assert isinstance(layer, EVLDecoderLayer)
        layer.formulation = "plain"
    expected = torch.autograd.grad(head(features).square().sum(), head.blocks.parameters())
    assert all(x.any() for x in got)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("name", "std"), [("aim", 0.01), ("finetune-top", 0.01), ("st-adapter", 0.02)])
def test_linear_begins_as_wide_as_in_the_official_code(name, std):
    torch.manual_seed(0)
    linear = get_head(name)(get_head(name).Config(num_classes=40, train_blocks=False)).classifier.fc_cls
    assert linear.weight.std().item() == pytest.approx(std, rel=0.05)
    assert not linear.bias.any()


@pytest.mark.parametrize(
    ("name", "classifier", "trained"),
    [
        ("aim", "linear", True),
        ("aim", "text", True),
        ("aim", "evl", False),  # reads what leaves the blocks
        ("finetune-top", "linear", True),
        ("st-adapter", "linear", False),  # frozen in the official code
    ],
)
def test_ln_post_is_trained_where_the_papers_do_and_something_reads_it(on_tail, name, classifier, trained):
    assert all(p.requires_grad == trained for p in on_tail(name, classifier=classifier).ln_post.parameters())


@pytest.mark.parametrize("classifier", ["linear", "evl", "text"])
def test_class_embeddings_are_the_rows_that_decide(on_tail, features, classifier):
    head = on_tail("finetune-top", classifier=classifier)
    with torch.no_grad():
        head.class_embeddings()[1] = head.class_embeddings()[4]
        if classifier != "text":
            head.classifier.fc_cls.bias.zero_()
    logits = head(features)
    torch.testing.assert_close(logits[:, 1], logits[:, 4], rtol=0, atol=1e-6)


def test_class_embeddings_of_text_that_was_not_given_are_refused(sizes):
    config = FinetuneTop.Config(num_classes=sizes.K, width=sizes.D, num_heads=sizes.H, classifier="text")
    with pytest.raises(ValueError, match="given none"):
        FinetuneTop(config).class_embeddings()


@pytest.mark.parametrize("classifier", ["linear", "evl"])
def test_of_no_clip_there_are_no_logits_and_gradients_of_zero(on_tail, features, sizes, classifier):
    """A process of several may have no clip of the last batch."""
    for name in ("aim", "st-adapter", "finetune-top", "tokent1d", "shift"):
        head = on_tail(name, classifier=classifier, blocks=3)
        logits = head(ClipFeatures(stem=features.stem[:0]))
        assert logits.shape == (0, sizes.K)
        logits.sum().backward()
        trained = [p for p in head.parameters() if p.requires_grad]
        assert all(p.grad is not None and not p.grad.any() for p in trained)


@pytest.mark.parametrize("classifier", ["linear", "evl", "text"])
@pytest.mark.parametrize("name", ["aim", "st-adapter", "finetune-top", "tokent1d", "shift"])
def test_under_autocast_logits_and_gradients_are_those_of_float32_but_for_rounding(on_tail, features, name, classifier):
    head = on_tail(name, classifier=classifier, drawn=True)
    parameters = [p for p in head.parameters() if p.requires_grad and p.ndim]  # the scale is not evaluated with
    found = []
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits = head(features).float()
        found.append((logits, *torch.autograd.grad((logits / logits.detach().abs().max()).square().sum(), parameters)))
    for half, single in zip(*found, strict=True):
        assert half.dtype == single.dtype
        assert (half - single).norm() < 0.15 * single.norm() + 1e-4


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"classifier": "knn"}, "classifier ('knn') must be one of 'linear', 'evl', 'text'"),
        ({"blocks": 2, "decoder_layers": 3}, "decoder_layers (3) must be between 1 and 2, the blocks that are run"),
        ({"decoder_layers": 0}, "decoder_layers (0) must be between 1 and 6, the blocks that are run"),
        ({"dropout": 1.0}, "dropout (1.0) must be in [0, 1)"),
        ({"num_heads": 5}, "num_heads (5) must divide the width (768)"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings, words, refusal):
    assert refusal(FinetuneTop.Config(num_classes=2), settings) == words
