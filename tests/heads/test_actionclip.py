"""ActionCLIP against the official modules and losses (goldens made at 31c34df), several classes a video, several processes."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from vcache.heads.actionclip import ActionCLIP, dual_softmax, kl_of_matches
from vcache.heads.requirements import ClipFeatures
from vcache.heads.temporal_fusion import FrameConv, FrameTransformer, FrameTransformerCls
from vcache.heads.text import ClassText

GOLDENS = Path(__file__).parents[1] / "goldens"
TOLERANCE = {"rtol": 1e-5, "atol": 2e-5}
PROMPTS = {"meanp": "meanp", "conv1d": "conv_1d", "lstm": "lstm", "transf": "transf"}
"""And their goldens. The official checkpoints of conv1d are scrambled."""
B, T, K, M, E = 5, 3, 4, 6, 16  # small, and all different


def golden(name: str) -> dict[str, Tensor]:
    with np.load(GOLDENS / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def alone(own: Tensor) -> Tensor:
    """The rows of all processes, where there is one."""
    return own


def make_head(**fields: object) -> ActionCLIP:
    config = ActionCLIP.Config(**{"num_classes": K, "num_frames": T, "embed_dim": E, "prompt": "meanp", **fields})  # type: ignore[arg-type]
    head = ActionCLIP(config)
    generator = torch.Generator().manual_seed(3)
    head.set_text(ClassText(torch.randn(K, M, E, generator=generator), 1.5))
    return head


def make_clips(num_clips: int = B) -> ClipFeatures:
    return ClipFeatures(embed=torch.randn(num_clips, T, E, generator=torch.Generator().manual_seed(4)))


def golden_head(prompt: str, arrays: dict[str, Tensor]) -> ActionCLIP:
    """With its weights, and a text for each class and template that `drawn_at` draws for its videos."""
    facts = json.loads((GOLDENS / f"actionclip_{PROMPTS[prompt]}.json").read_text())
    config = ActionCLIP.Config(
        num_classes=5,
        num_frames=facts["T"],
        embed_dim=facts["embed_dim"],
        prompt=prompt,  # type: ignore[arg-type]
        prompt_heads=facts["heads"],
        scrambled=True,
    )
    head = ActionCLIP(config).eval()
    head.fusion_model.load_state_dict({key[2:]: x for key, x in arrays.items() if key.startswith("w/")})
    texts, labels = torch.randn(5, 3, facts["embed_dim"]), arrays["in/labels"]
    texts[labels, drawn_at(SEED)] = arrays["in/text_emb"]
    head.set_text(ClassText(texts, math.log(facts["logit_scale"])))
    return head


SEED = 1


def drawn_at(seed: int) -> Tensor:
    """Templates of three videos; two of them have the same class, and so must have different templates."""
    torch.manual_seed(seed)
    drawn = torch.randint(3, (3,))
    assert drawn[0] != drawn[2]
    return drawn


@pytest.mark.parametrize("prompt", PROMPTS)
def test_embeddings_similarities_losses_and_gradients_are_the_official_ones(prompt: str) -> None:
    arrays = golden(f"actionclip_{PROMPTS[prompt]}")
    head, features = golden_head(prompt, arrays), ClipFeatures(embed=arrays["in/frame_emb"])
    video = head.embed(features)
    torch.testing.assert_close(video, arrays["out/video_emb"], **TOLERANCE)
    check_gradients(head, (video**2).sum(), arrays, "grad/")

    labels = arrays["in/labels"]
    of_videos = 100 * F.normalize(video, dim=1) @ F.normalize(arrays["in/text_emb"], dim=1).T
    matching = (labels[:, None] == labels).float()
    torch.testing.assert_close(of_videos, arrays["out/logits_per_image"], **TOLERANCE)
    torch.testing.assert_close(of_videos.T, arrays["out/logits_per_text"], **TOLERANCE)
    torch.testing.assert_close(matching, arrays["out/ground_truth"], rtol=0, atol=0)
    torch.testing.assert_close(kl_of_matches(of_videos, matching).mean(), arrays["out/loss_img"], **TOLERANCE)
    torch.testing.assert_close(kl_of_matches(of_videos.T, matching.T).mean(), arrays["out/loss_txt"], **TOLERANCE)

    torch.manual_seed(SEED)
    loss, _ = head.training_loss(features, labels, alone)
    torch.testing.assert_close(loss.mean(), arrays["out/loss_total"], **TOLERANCE)
    check_gradients(head, loss.mean(), arrays, "grad/kl/")


def check_gradients(head: ActionCLIP, of: Tensor, arrays: dict[str, Tensor], prefix: str) -> None:
    head.zero_grad()
    if of.requires_grad:
        of.backward()
    own = dict(head.fusion_model.named_parameters())
    names = [key.removeprefix(prefix) for key in arrays if key.startswith(prefix) and key.removeprefix(prefix) in own]
    assert names or not own
    for name in names:
        torch.testing.assert_close(own[name].grad, arrays[prefix + name], rtol=1e-4, atol=2e-5)


def test_probabilities_are_averaged_over_the_templates_as_officially() -> None:
    arrays = golden("actionclip_eval_templates")
    head = ActionCLIP(ActionCLIP.Config(num_classes=7, num_frames=4, embed_dim=64, prompt="meanp")).eval()
    head.set_text(ClassText(arrays["in/text_feats"].unflatten(0, (3, 7)).transpose(0, 1), 0.3))
    said = head(ClipFeatures(embed=arrays["in/frame_emb"]))
    torch.testing.assert_close(said.exp(), arrays["out/probs"], **TOLERANCE)
    torch.testing.assert_close(said.softmax(dim=1), arrays["out/probs"], **TOLERANCE)


def test_a_class_that_is_far_away_has_a_finite_logarithm() -> None:
    head = make_head()
    near = torch.eye(E)[0]
    head.set_text(ClassText(torch.stack([near, -near])[:, None].expand(2, M, E), 0.0))
    said = head(ClipFeatures(embed=near.expand(1, T, E)))
    torch.testing.assert_close(said, torch.tensor([[0.0, -200.0]]))


def test_the_kl_loss_is_the_official_one() -> None:
    arrays = golden("kl_losses")
    loss = kl_of_matches(arrays["in/pred"], arrays["in/gt"]).mean()
    torch.testing.assert_close(loss, arrays["out/kl"], **TOLERANCE)
    torch.testing.assert_close(loss, arrays["out/nce"], **TOLERANCE)  # NCELoss of Text4Vis is the same
    dual = dual_softmax(arrays["in/pred"], arrays["in/pred"])
    torch.testing.assert_close(kl_of_matches(dual, arrays["in/gt"]).mean(), arrays["out/ds"], **TOLERANCE)


def test_a_dual_softmax_of_two_processes_is_that_of_the_whole_batch() -> None:
    head, clips, classes = make_head(dual_softmax=True), make_clips(4), torch.tensor([0, 1, 1, 2])
    one_template = ClassText(torch.randn(K, 1, E, generator=torch.Generator().manual_seed(6)), 1.5)
    head.set_text(one_template)
    gathered: list[Tensor] = []

    def alone(own: Tensor) -> Tensor:
        gathered.append(own)
        return own

    whole, _ = head.training_loss(clips, classes, alone)
    of_all = iter([*gathered, *gathered])
    assert clips.embed is not None
    halves = [
        head.training_loss(ClipFeatures(embed=clips.embed[rows]), classes[rows], lambda own: next(of_all))[0]
        for rows in (slice(0, 2), slice(2, 4))
    ]
    torch.testing.assert_close(torch.cat(halves), whole)
    plain = make_head()
    plain.set_text(one_template)
    assert (plain.training_loss(clips, classes, lambda own: own)[0] - whole).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("prompt", "numbers"),
    [
        ("meanp", (0, 0)),
        ("conv1d", (40_960, 61_440)),
        ("lstm", (2_140_672, 4_783_872)),
        ("transf", (18_953_728, 42_586_368)),
        ("transf_cls", (18_959_872, 33_152_256)),
    ],
)
def test_the_numbers_of_parameters_are_those_of_the_official_modules(prompt: str, numbers: tuple[int, int]) -> None:
    """Of ViT-B and ViT-L, with the table of positions that three of them do not read."""
    for width, number in zip((512, 768), numbers, strict=True):
        with torch.device("meta"):
            head = ActionCLIP(ActionCLIP.Config(num_classes=400, embed_dim=width, prompt=prompt))  # type: ignore[arg-type]
        assert sum(p.numel() for p in head.parameters()) == number + 1  # and the logit scale


@given(st.integers(1, 6), st.integers(1, 4))
def test_conv1d_begins_as_a_shift_over_time(num_frames: int, quarter: int) -> None:
    """A quarter of the channels takes the frame before, a quarter the frame after, the rest its own; each with its own added."""
    x = torch.randn(2, num_frames, 4 * quarter, generator=torch.Generator().manual_seed(num_frames))
    padded = F.pad(x, (0, 0, 1, 1))
    before, own, after = (padded[:, i : i + num_frames] for i in range(3))
    moved = torch.cat([before[..., :quarter], own[..., quarter : 3 * quarter], after[..., 3 * quarter :]], dim=2)
    torch.testing.assert_close(FrameConv(4 * quarter)(x), (x + moved).mean(dim=1))


@pytest.mark.parametrize("width", [1, 2, 3, 6, 7])
def test_conv1d_of_a_width_that_has_no_quarter_moves_the_last_channels_as_coded(width: int) -> None:
    """weight[-width // 4 :] of the official code rounds up, and of fewer than four channels takes one."""
    moved_back = FrameConv(width).shift.weight[:, 0, 2]
    num_moved = math.ceil(width / 4)
    assert moved_back.tolist() == [0.0] * (width - num_moved) + [1.0] * num_moved


def test_transf_cls_is_a_post_norm_encoder_of_torch_over_frames_first() -> None:
    torch.manual_seed(2)
    module, x = FrameTransformerCls(E, T), torch.randn(B, T, E)
    for p in module.parameters():
        p.data += 0.3 * torch.randn_like(
            p
        )  # small gains of the norms would leave nothing of what tells the tokens apart
    inner, state = module.transformer, module.state_dict()
    oracle = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, 8), 6, nn.LayerNorm(E), enable_nested_tensor=False)
    prefix = "transformer.transformer_enc."
    oracle.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    tokens = torch.cat([inner.cls_token.expand(B, 1, E), x], dim=1) + inner.pos_embed
    expected = oracle.eval()(tokens.transpose(0, 1))[0]
    torch.testing.assert_close(module.eval()(x), expected, **TOLERANCE)
    module.train()
    assert not torch.equal(module(x), module(x))  # dropout, as in the official layers
    dropouts = [one.p for one in inner.modules() if isinstance(one, nn.Dropout)]
    assert dropouts == [0.1] * 18


def test_the_transformers_begin_with_the_small_weights_of_the_official_modules() -> None:
    torch.manual_seed(5)
    before, post = FrameTransformer(32, 2), FrameTransformerCls(32, T)
    block, layer = before.transformer.resblocks[0], post.transformer.transformer_enc.layers[0]
    for weight in (before.frame_position_embeddings.weight, block.mlp.c_fc.weight, block.attn.out_proj.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    drawn = layer.linear1.weight
    # A normal number beyond 2 is folded to near 0, which no clamp does.
    assert drawn.abs().max() < 0.04 and (drawn.abs() > 0.0399).float().mean() < 0.002
    assert drawn.std().item() == pytest.approx(0.0174, rel=0.03)
    for bias in (block.mlp.c_fc.bias, block.attn.out_proj.bias, layer.linear1.bias):
        assert not bias.any()


def test_transf_cls_alone_wants_the_frames_that_it_was_made_for() -> None:
    wanted = {prompt: make_head(prompt=prompt) for prompt in (*PROMPTS, "transf_cls")}
    num_frames = {prompt: head.requires(head.config).num_frames for prompt, head in wanted.items()}
    assert num_frames == dict.fromkeys(PROMPTS) | {"transf_cls": T}
    longer = ClipFeatures(embed=torch.randn(B, T + 1, E))
    for prompt in PROMPTS:
        assert wanted[prompt](longer).shape == (B, K)
    with pytest.raises(ValueError, match="the head was made for clips of 3 frames, got 4"):
        wanted["transf_cls"](longer)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": "transf_cls", "embed_dim": 20}, "'transf_cls' has 8 heads, which do not divide the 20 channels"),
        ({"prompt": "transf", "prompt_heads": 3}, "'transf' has 3 heads, which do not divide the 16 channels"),
    ],
)
def test_heads_that_do_not_divide_the_width_are_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_head(**fields)


SEVERAL = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]]).float()
"""The classes of five videos; the last has none."""


@pytest.mark.parametrize(
    ("setting", "known"),
    [("prompt", "'meanp', 'conv1d', 'lstm', 'transf', 'transf_cls'"), ("matches", "'softmax', 'ideal'")],
)
def test_a_choice_that_is_not_there_is_refused_with_those_that_are(setting: str, known: str) -> None:
    config = ActionCLIP.Config(num_classes=K)
    object.__setattr__(config, setting, "mean")  # the type checker of the tests refuses it on the way in
    with pytest.raises(ValueError, match=rf"{setting} \('mean'\) must be one of {known}"):
        config.__post_init__()


@pytest.mark.parametrize("name", ["num_classes", "num_frames", "embed_dim", "prompt_heads"])
def test_a_size_below_1_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} .0. must be at least 1"):
        ActionCLIP.Config(**{"num_classes": K, name: 0})


@pytest.mark.parametrize("matches", ["softmax", "ideal"])
@pytest.mark.parametrize("several", [False, True])
def test_the_loss_is_what_it_is_written_out(matches: str, several: bool) -> None:
    head, features = make_head(matches=matches), make_clips()
    targets = SEVERAL if several else torch.tensor([3, 0, 3, 1, 0])
    own_classes = [set(row.nonzero().flatten().tolist()) for row in (SEVERAL if several else F.one_hot(targets, K))]
    torch.manual_seed(8)
    got, _ = head.training_loss(features, targets, alone)
    classes, templates = drawn(head, targets, seed=8)
    assert features.embed is not None
    videos = F.normalize(features.embed.mean(dim=1), dim=1)
    s = math.exp(1.5) * videos @ head.texts[classes, templates].T
    gt = torch.tensor([[float(int(c) in own) for c in classes] for own in own_classes])  # [i, j]: video i, text j
    for i in range(B):
        row = kl(wanted(gt[i], matches), s[i].softmax(0))
        column = kl(wanted(gt[:, i], matches), s[:, i].softmax(0))
        torch.testing.assert_close(got[i], (row + column) / 2, **TOLERANCE)


def wanted(matching: Tensor, matches: str) -> Tensor:
    if matches == "softmax":
        return (10 * matching).softmax(0)
    return matching / matching.sum() if matching.any() else matching


def kl(p: Tensor, q: Tensor) -> Tensor:
    return torch.stack([a * (a / b).log() if a else torch.zeros(()) for a, b in zip(p, q, strict=True)]).sum()


def drawn(head: ActionCLIP, targets: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """The class and template of each video's text, found by asking which text the loss hands to the other processes."""
    handed: list[Tensor] = []
    torch.manual_seed(seed)
    head.training_loss(make_clips(), targets, lambda own: handed.append(own) or own)
    texts = next(x for x in handed[1:] if x.ndim == 2 and x.shape[1] == E)
    near = (texts @ head.texts.flatten(0, 1).T).argmax(dim=1)
    return near // M, near % M


def test_a_text_is_of_one_of_the_classes_of_its_video_in_any_template() -> None:
    head = make_head()
    seen = [drawn(head, SEVERAL, seed) for seed in range(40)]
    classes = [{int(classes[i]) for classes, _ in seen} for i in range(B)]
    assert classes == [{0, 2}, {1}, {0, 1, 2, 3}, {3}, {0, 1, 2, 3}]  # the last video has none
    assert {int(template) for _, templates in seen for template in templates} == set(range(M))
    torch.testing.assert_close(drawn(head, SEVERAL, 5), seen[5], rtol=0, atol=0)


@pytest.mark.parametrize("prompt", [*PROMPTS, "transf_cls"])
@pytest.mark.parametrize("multi_hot", [False, True])
@pytest.mark.parametrize("shares", [(2, 3), (5, 0), (0, 5)], ids=str)
def test_two_processes_have_the_loss_and_gradients_of_one(
    prompt: str, multi_hot: bool, shares: tuple[int, int]
) -> None:
    """With the same texts drawn: each class has one template, and each video one class."""
    head, features = make_head(prompt=prompt).eval(), make_clips()
    head.set_text(ClassText(head.texts[:, :1].clone(), 1.5))
    targets = torch.tensor([3, 0, 3, 1, 0])
    targets = F.one_hot(targets, K).float() if multi_hot else targets
    whole, _ = head.training_loss(features, targets, alone)
    expected = gradients(head, whole.sum())
    assert features.embed is not None
    parts = zip(features.embed.split(shares), targets.split(shares), strict=True)
    losses = run_as_processes(head, [(ClipFeatures(embed=embed), part) for embed, part in parts])
    torch.testing.assert_close(torch.cat(losses), whole, **TOLERANCE)
    torch.testing.assert_close(gradients(head, torch.cat(losses).sum()), expected, rtol=1e-4, atol=1e-5)


def gradients(head: ActionCLIP, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [p for p in head.parameters() if p.requires_grad]))


def run_as_processes(head: ActionCLIP, shares: list[tuple[ClipFeatures, Tensor]]) -> list[Tensor]:
    """What each process's `training_loss` gives, in one graph: the gradient of their sum is what real processes sum up.

    A first round collects what each hands over, a second gives to each what all have handed over.
    """
    handed: list[list[Tensor]] = []
    for share in shares:
        own: list[Tensor] = []
        head.training_loss(*share, lambda x, own=own: own.append(x) or x)
        handed.append(own)
    losses = []
    for rank, share in enumerate(shares):
        answers = iter(zip(*handed, strict=True))

        def gather(x: Tensor, rank: int = rank, answers=answers) -> Tensor:
            parts = list(next(answers))
            torch.testing.assert_close(x, parts[rank], rtol=0, atol=0)
            return torch.cat(parts)

        losses.append(head.training_loss(*share, gather)[0])
    return losses


def test_without_text_the_head_says_what_to_call() -> None:
    head = ActionCLIP(ActionCLIP.Config(num_classes=K, num_frames=T, embed_dim=E, prompt="meanp"))
    asks = (
        lambda: head(make_clips()),
        lambda: head.training_loss(make_clips(), torch.zeros(B).long(), alone),
        lambda: head.class_embeddings(),
    )
    for ask in asks:
        with pytest.raises(ValueError, match=r"was given none; call its set_text\(ClassText\(...\)\) first"):
            ask()
    with pytest.raises(ValueError, match="text embeddings have 17 channels, those of the videos 16"):
        head.set_text(ClassText(torch.randn(K, M, E + 1), 1.0))


def test_text_goes_with_the_state_and_a_trained_scale_stays() -> None:
    head = make_head()
    other = ActionCLIP(ActionCLIP.Config(num_classes=K, num_frames=T, embed_dim=E, prompt="meanp"))
    other.load_state_dict(head.state_dict())
    torch.testing.assert_close(other(make_clips()), head(make_clips()), rtol=0, atol=0)
    torch.testing.assert_close(other.class_embeddings(), head.class_embeddings(), rtol=0, atol=0)
    other.set_text(ClassText(torch.randn(K + 3, 1, E), 9.0))
    assert other(make_clips()).shape == (B, K + 3) and float(other.logit_scale.detach()) == 1.5
    names = {name for name, _ in head.named_parameters()} | {"texts"}
    assert head.state_dict().keys() == names  # the mean is made of the texts again


def test_the_logits_in_training_are_of_the_mean_template() -> None:
    head, features = make_head(), make_clips()
    _, logits = head.training_loss(features, torch.zeros(B).long(), alone)
    expected = 100 * F.normalize(head.embed(features), dim=1) @ F.normalize(head.texts.mean(dim=1), dim=1).T
    torch.testing.assert_close(logits, expected, **TOLERANCE)
