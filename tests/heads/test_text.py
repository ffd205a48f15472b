"""Classification by text embeddings: CLIP's own way, whatever the number of templates and classes."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from vcache.heads.text import ClassText, TextClassifier

B, K, E = 3, 5, 8


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def classifier(text: ClassText) -> TextClassifier:
    made = TextClassifier(K, E)
    made.set(text)
    return made


def test_logits_of_one_template_are_scaled_cosines():
    videos, text = draw(B, E), draw(K, 1, E, seed=1)
    expected = 100 * cosine_similarity(videos[:, None], text[None, :, 0], dim=-1)
    logits = classifier(ClassText(text, torch.tensor(100.0).log().item()))(videos)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_templates_are_normalised_before_they_are_averaged():  # Radford et al. 2021, prompt ensembling in the embedding space
    text = draw(K, 4, E, seed=2)
    louder = text * torch.tensor([0.1, 1.0, 7.0, 30.0])[:, None]
    videos = draw(B, E)
    torch.testing.assert_close(classifier(ClassText(louder, 1.0))(videos), classifier(ClassText(text, 1.0))(videos))


def test_the_text_is_no_parameter_and_belongs_to_the_state_dict():
    made = classifier(ClassText(draw(K, 2, E), 1.5))
    assert list(made.parameters()) == []
    other = TextClassifier(K, E)
    other.load_state_dict(made.state_dict())
    videos = draw(B, E, seed=3)
    torch.testing.assert_close(other(videos), made(videos), rtol=0, atol=0)


def test_other_classes_of_another_number_can_be_given():
    made, text = classifier(ClassText(draw(K, 1, E), 1.0)), draw(K + 4, 1, E, seed=4)
    made.set(ClassText(text, 1.0))
    assert made(draw(B, E)).shape == (B, K + 4)


def test_without_text_it_does_not_classify():
    empty = TextClassifier(K, E)
    with pytest.raises(ValueError, match="given none"):
        empty(draw(B, E))
    again = TextClassifier(K, E)
    again.load_state_dict(empty.state_dict())  # what is saved without text is loaded without
    with pytest.raises(ValueError, match="given none"):
        again(draw(B, E))


def test_text_of_another_width_is_refused():
    with pytest.raises(ValueError, match=f"{E + 1} channels, those of the videos {E}"):
        TextClassifier(K, E).set(ClassText(draw(K, 1, E + 1), 1.0))


def test_logits_are_in_float32_under_autocast():
    made, videos = classifier(ClassText(draw(K, 1, E), 4.6)), draw(B, E)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = made(videos.bfloat16())
    torch.testing.assert_close(logits, made(videos.bfloat16().float()), rtol=0, atol=0)
