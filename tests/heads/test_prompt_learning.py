"""CoOp's learnt context: what goes through the tower, how often, and where the gradients go. The tower is a made-up one."""

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vcache.heads import prompt_learning
from vcache.heads.prompt_learning import ClassPrompts, PromptClassifier, PromptLearner

B, W, E, M = 3, 6, 5, 2
ENDS = (6, 4, 9, 5, 5)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Tower:
    """Of each text a product of what stands before its end, so that neighbours matter; counts what it is given."""

    def __init__(self) -> None:
        self.weight = draw(W, E, seed=1).requires_grad_()
        self.given: list[tuple[int, int]] = []
        """(texts, length) of each call."""

    def __call__(self, tokens: Tensor, ends: Tensor) -> Tensor:
        self.given.append((tokens.shape[0], tokens.shape[1]))
        seen = (tokens * draw(1, 12, W, seed=2)[:, : tokens.shape[1]]).sin().cumsum(dim=1)
        return seen[torch.arange(len(ends)), ends].square() @ self.weight.detach()


def prompts(ends: Sequence[int] = ENDS, tower: Callable[..., Tensor] | None = None, scale: float = 1.5) -> ClassPrompts:
    return ClassPrompts(draw(len(ends), 12, W, seed=3), torch.tensor(ends), tower or Tower(), scale)


def learner(given: ClassPrompts, num_classes: int | None = None) -> PromptLearner:
    torch.manual_seed(7)
    made = PromptLearner(M, W, num_classes)
    made.set(given)
    return made


@pytest.mark.parametrize("own", [False, True])
def test_the_vectors_stand_between_the_start_and_the_name(own: bool) -> None:
    given = prompts()
    made = learner(given, len(ENDS) if own else None)
    for k, end in enumerate(ENDS):
        context = made.ctx[k] if own else made.ctx
        prompt = torch.cat([given.tokens[k, :1], context, given.tokens[k, 1 + M : end + 1]])
        expected = Tower()(prompt[None], torch.tensor([end]))[0]
        torch.testing.assert_close(made()[k], expected)


@settings(max_examples=25, deadline=None)
@given(
    ends=st.lists(st.integers(M + 2, 11), min_size=1, max_size=9),
    chunk=st.integers(1, 4),
    kept=st.sampled_from((0, 1000)),
    own=st.booleans(),
)
def test_chunks_bound_what_passes_the_tower_and_change_nothing(
    ends: list[int], chunk: int, kept: int, own: bool
) -> None:
    tower, towards = Tower(), draw(len(ends), E, seed=4)
    whole = learner(prompts(ends), len(ends) if own else None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompt_learning, "CHUNK", chunk)
        patch.setattr(prompt_learning, "KEPT_TOKENS", kept)
        parts = learner(prompts(ends, tower), len(ends) if own else None)
        torch.testing.assert_close(parts(), whole())
        (parts() * towards).sum().backward()
    (whole() * towards).sum().backward()
    torch.testing.assert_close(parts.ctx.grad, whole.ctx.grad)
    assert max(texts for texts, _ in tower.given) <= chunk
    assert {length for _, length in tower.given} <= {end + 1 for end in ends}  # nothing behind the longest end


@pytest.mark.parametrize(("num_kept", "passes"), [(36, 1), (35, 2)])  # 2 names of 6 tokens, 2 of 7 and 1 of 10
def test_what_the_backward_of_many_tokens_needs_is_made_again(
    monkeypatch: pytest.MonkeyPatch, num_kept: int, passes: int
) -> None:
    tower = Tower()
    monkeypatch.setattr(prompt_learning, "CHUNK", 2)
    monkeypatch.setattr(prompt_learning, "KEPT_TOKENS", num_kept)
    embeddings = learner(prompts(tower=tower))()
    assert tower.given == [(2, 6), (2, 7), (1, 10)]
    embeddings.sum().backward()
    assert sorted(tower.given) == sorted([(2, 6), (2, 7), (1, 10)] * passes)


def test_gradients_reach_the_context_and_the_scale_alone_and_only_these_are_saved() -> None:
    tower = Tower()
    head = PromptClassifier(M, W)
    head.set(prompts(tower=tower))
    head(draw(B, E)).square().sum().backward()
    assert {name for name, p in head.named_parameters() if p.grad is not None} == {"prompt_learner.ctx", "logit_scale"}
    assert set(head.state_dict()) == {"prompt_learner.ctx", "logit_scale"}
    assert tower.weight.grad is None


def test_logits_are_scaled_cosines_also_under_autocast() -> None:
    head = PromptClassifier(M, W)
    head.set(prompts(scale=torch.tensor(50.0).log().item()))
    videos = draw(B, E)
    cosines = cosine_similarity(videos[:, None], head.embeddings[None], dim=-1)
    torch.testing.assert_close(head(videos), 50 * cosines, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(head(videos, scale=100.0), 100 * cosines, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head(videos.bfloat16()).dtype == torch.float32


def test_the_scale_of_a_trained_head_stays_when_other_classes_are_given() -> None:
    head = PromptClassifier(M, W)
    head.set(prompts(scale=1.5))
    assert head.logit_scale.item() == 1.5
    head.set(prompts(ENDS[:3], scale=4.0))
    assert head.logit_scale.item() == 1.5 and head(draw(B, E)).shape == (B, 3)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_tower_runs_once_for_the_same_vectors(mode: Callable[[], torch.no_grad]) -> None:
    tower = Tower()
    made = learner(prompts(tower=tower))
    optimiser = torch.optim.AdamW(made.parameters(), lr=0.1, fused=True)

    def calls(change: Callable[[], object]) -> int:
        change()
        before = len(tower.given)
        with mode():
            first, second = made(), made()
        assert torch.equal(first, second)
        calls = len(tower.given) - before
        torch.testing.assert_close(first, made().detach(), rtol=0, atol=0)  # with gradients they are always made
        return calls

    def train() -> None:
        made().sum().backward()
        optimiser.step()

    assert calls(lambda: None) == 1 and calls(lambda: None) == 0
    assert calls(train) == 1
    other = PromptLearner(M, W).state_dict()
    assert calls(lambda: made.load_state_dict(other)) == 1 and calls(lambda: made.load_state_dict(other)) == 0
    assert calls(lambda: made.ctx.data.mul_(2)) == 1  # which no counter of torch's sees
    assert calls(lambda: made.set(prompts(tower=tower))) == 1


def test_a_copy_shares_the_tower_and_nothing_else() -> None:
    tower = Tower()
    made = learner(prompts(tower=tower))
    with torch.inference_mode():
        before = made()
    twin = copy.deepcopy(made)
    with torch.no_grad():
        twin.ctx.add_(1)
        assert not torch.equal(twin(), before) and torch.equal(made(), before)
    assert len(tower.given) == 2  # of both: the tower of the copy is this one


def test_the_vectors_are_drawn_small_and_each_class_may_have_its_own() -> None:
    torch.manual_seed(0)
    assert PromptLearner(40, 50).ctx.std().item() == pytest.approx(0.02, rel=0.1)
    assert PromptLearner(M, W).ctx.shape == (M, W) and PromptLearner(M, W, 4).ctx.shape == (4, M, W)


def test_prompts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="learnt vectors have 7 channels, the tokens of the tower 6"):
        PromptLearner(M, W + 1).set(prompts())
    with pytest.raises(ValueError, match="each of 4 classes has a context of its own, and prompts of 5 were given"):
        PromptLearner(M, W, 4).set(prompts())
    with pytest.raises(ValueError, match="given none"):
        PromptClassifier(M, W)(draw(B, E))
