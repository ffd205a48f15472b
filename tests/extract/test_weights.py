"""Weights are really loaded or refused, and their digest depends on their values alone."""

import json
import warnings
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vcache.extract.backbone import (
    ActivationMismatch,
    BackboneError,
    RandomWeightsRefused,
    UnsupportedBackbone,
    load_backbone,
)
from vcache.extract.tower_weights import weights_sha256

TINY = "tiny-vit"
VISION = {"image_size": 32, "patch_size": 8, "width": 48, "layers": 2, "head_width": 12}
CONFIG = {
    "embed_dim": 20,
    "vision_cfg": VISION,
    "text_cfg": {"context_length": 6, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """All weights, text too, of open_clip's new models `tiny-vit` and `tiny-vit-quickgelu`."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, TINY, CONFIG)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, f"{TINY}-quickgelu", {**CONFIG, "quick_gelu": True})
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return dict(open_clip.CLIP(**CONFIG).state_dict())


@pytest.fixture
def checkpoint(state: dict[str, Tensor], tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    save_file(state, path)
    return path


def refuse(error: type[Exception], message: str, model: str, pretrained: str | Path | None) -> None:
    """One line that says `message`, and the caller learns nothing else first."""
    with pytest.raises(error, match=message) as raised:
        load_backbone(model, str(pretrained) if isinstance(pretrained, Path) else pretrained)
    assert "\n" not in str(raised.value)


# Every way in which open_clip ends with random weights, or would with `strict=False`.


@pytest.mark.parametrize("pretrained", [None, ""])
def test_no_pretrained_weights(pretrained: str | None) -> None:
    message = (
        r"^ViT-B-16 without pretrained weights would be random: "
        r"pass --pretrained FILE or a tag \(laion400m_e31, .* more\)\.$"
    )
    refuse(RandomWeightsRefused, message, "ViT-B-16", pretrained)


def test_unknown_tag() -> None:
    message = r"^--pretrained opnai: neither a file nor a tag of ViT-B-32-quickgelu \(.*\); did you mean 'openai'\?$"
    refuse(RandomWeightsRefused, message, "ViT-B-32-quickgelu", "opnai")


def test_tag_of_another_model() -> None:
    refuse(RandomWeightsRefused, "neither a file nor a tag of ViT-S-16 ", "ViT-S-16", "openai")


def test_file_that_is_not_there(tmp_path: Path) -> None:
    refuse(RandomWeightsRefused, "gone.pt: neither a file nor a tag of ViT-B-16 ", "ViT-B-16", tmp_path / "gone.pt")


def test_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG}))
    message = "holds no weight file, so its model would be random: add open_clip_model.safetensors.$"
    refuse(RandomWeightsRefused, message, f"local-dir:{tmp_path}", None)


def test_folder_with_several_unknown_weight_files(tmp_path: Path, state: dict[str, Tensor]) -> None:
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG}))
    torch.save(state, tmp_path / "epoch_1.pt")
    assert load_backbone(f"local-dir:{tmp_path}", None).facts.num_layers == 2
    torch.save(state, tmp_path / "epoch_2.pt")
    message = r"several weight files \(epoch_1.pt, epoch_2.pt\): name the one to use open_clip_model.safetensors"
    refuse(RandomWeightsRefused, message, f"local-dir:{tmp_path}", None)


def test_pretrained_beside_a_folder_is_not_ignored(tiny_clip: Path) -> None:
    refuse(
        RandomWeightsRefused,
        "brings its own weights: leave --pretrained openai out",
        f"local-dir:{tiny_clip}",
        "openai",
    )


def test_hub_repository_whose_weights_may_be_missing() -> None:
    refuse(UnsupportedBackbone, "download that repository and pass local-dir:FOLDER", "hf-hub:someone/clip", None)


def test_download_without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    message = "^the 'openai' weights of ViT-B-16-quickgelu could not be downloaded: pass a copy of them with --pretrained FILE"
    refuse(RandomWeightsRefused, message, "ViT-B-16-quickgelu", "openai")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", r"does not fit tiny-vit: weights 1 missing \(ln_post.bias\)\.$"),
        ("renamed", r"weights 1 missing \(ln_post.bias\), 1 left over \(ln_post.shift\)\.$"),
        ("another_width", r"weights 1 of another shape \(proj is \[48, 7\], not \[48, 20\]\)\.$"),
        ("another_image_size", r"\(positional_embedding is \[10, 48\], not \[17, 48\]\)\.$"),
        ("text_only", r"holds no image tower under open_clip's names \(visual\.\*\)"),
        ("prefixed", r"holds no image tower under open_clip's names \(visual\.\*\)"),
    ],
)
def test_checkpoint_that_does_not_fit(state: dict[str, Tensor], tmp_path: Path, damage: str, message: str) -> None:
    if damage in ("missing", "renamed"):
        bias = state.pop("visual.ln_post.bias")
        state |= {"visual.ln_post.shift": bias} if damage == "renamed" else {}
    elif damage == "another_width":
        state["visual.proj"] = torch.zeros(48, 7)
    elif damage == "another_image_size":
        state["visual.positional_embedding"] = torch.zeros(10, 48)
    elif damage == "text_only":
        state = {name: tensor for name, tensor in state.items() if not name.startswith("visual.")}
    else:
        state = {f"model.{name}": tensor for name, tensor in state.items()}
    save_file(state, tmp_path / "odd.safetensors")
    refuse(RandomWeightsRefused, message, TINY, tmp_path / "odd.safetensors")


@pytest.mark.parametrize("name", ["broken.safetensors", "broken.pt"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04"])
def test_file_that_is_no_checkpoint(state: dict[str, Tensor], tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    refuse(RandomWeightsRefused, f"{name} cannot be read as a checkpoint: .", TINY, tmp_path / name)


def test_truncated_checkpoint(checkpoint: Path) -> None:
    checkpoint.write_bytes(checkpoint.read_bytes()[:-9])
    refuse(RandomWeightsRefused, "cannot be read as a checkpoint: ", TINY, checkpoint)


def test_pickled_code_is_not_run(state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({"state_dict": state, "model": nn.Linear(2, 3)}, tmp_path / "whole.pt")
    refuse(
        RandomWeightsRefused,
        r"cannot be read as a checkpoint: it holds torch.nn.modules.linear.Linear, which only .* vcache runs none.$",
        TINY,
        tmp_path / "whole.pt",
    )


# What names no model.


def test_unknown_model_is_guessed() -> None:
    refuse(
        UnsupportedBackbone,
        "^model 'ViT-B16': open_clip has none of that name; did you mean 'ViT-B-16'",
        "ViT-B16",
        "openai",
    )


@pytest.mark.parametrize("content", [None, "{", "{}", '{"model_cfg": {"embed_dim": 3, "vision_cfg": {"wdth": 4}}}'])
def test_folder_without_a_configuration(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "open_clip_config.json").write_text(content)
    refuse(BackboneError, "open_clip_config.json", f"local-dir:{tmp_path}", None)


# QuickGELU and GELU differ in no name and no shape.


def test_tag_trained_with_the_other_gelu_is_refused() -> None:
    message = "^the 'openai' weights were trained with QuickGELU, and ViT-B-16 computes GELU: pass --model ViT-B-16-quickgelu.$"
    refuse(ActivationMismatch, message, "ViT-B-16", "openai")


def test_openai_archive_needs_the_quickgelu_model(state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "ViT.pt"
    save_archive(state, path, quick_gelu=True)
    message = f"weights in {path} were trained with QuickGELU, and {TINY} computes GELU: pass --model {TINY}-quickgelu"
    refuse(ActivationMismatch, message, TINY, path)
    loaded = load_backbone(f"{TINY}-quickgelu", str(path)).visual.state_dict()
    half = {name: state[f"visual.{name}"].half().float() for name in loaded}
    torch.testing.assert_close(dict(loaded), half, rtol=0, atol=0)


def test_archive_of_a_gelu_model_is_refused_by_the_quickgelu_model(state: dict[str, Tensor], tmp_path: Path) -> None:
    save_archive(state, tmp_path / "gelu.pt", quick_gelu=False)
    assert load_backbone(TINY, str(tmp_path / "gelu.pt")).facts.model == TINY
    message = f"trained with GELU, and {TINY}-quickgelu computes QuickGELU: pass --model {TINY}.$"
    refuse(ActivationMismatch, message, f"{TINY}-quickgelu", tmp_path / "gelu.pt")


def test_openai_state_dict_is_known_by_the_numbers_it_carries(state: dict[str, Tensor], tmp_path: Path) -> None:
    state |= {name: torch.tensor(7) for name in ("input_resolution", "context_length", "vocab_size")}
    torch.save(state, tmp_path / "openai.pt")
    refuse(ActivationMismatch, "trained with QuickGELU", TINY, tmp_path / "openai.pt")
    assert load_backbone(f"{TINY}-quickgelu", str(tmp_path / "openai.pt")).facts.num_layers == 2


def save_archive(state: dict[str, Tensor], path: Path, *, quick_gelu: bool) -> None:
    """A TorchScript archive in float16, as OpenAI publishes its models."""
    clip = open_clip.CLIP(**CONFIG, quick_gelu=quick_gelu)
    clip.load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated, and what it warns of is not used here
        script = torch.jit.trace_module(clip.eval(), {"encode_image": torch.zeros(1, 3, 32, 32)}, check_trace=False)
        script.half().save(path)


# What is loaded.


def write(state: dict[str, Tensor], path: Path, layout: str) -> Path:
    """The same weights in each of the layouts that checkpoints come in."""
    if layout == "safetensors":
        path = path.with_suffix(".safetensors")
        save_file(state, path)
    elif layout == "training":
        torch.save({"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, path)
    elif layout == "legacy":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    elif layout == "reversed":
        torch.save(dict(reversed(state.items())), path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("layout", ["safetensors", "training", "legacy", "reversed"])
def test_digest_does_not_depend_on_the_file_format(state: dict[str, Tensor], tmp_path: Path, layout: str) -> None:
    plain = load_backbone(TINY, str(write(state, tmp_path / "plain.pt", "plain")))
    other = load_backbone(TINY, str(write(state, tmp_path / "other.pt", layout)))
    assert other.weights_sha256 == plain.weights_sha256 and len(plain.weights_sha256) == 64
    visual = {name.removeprefix("visual."): tensor for name, tensor in state.items() if name.startswith("visual.")}
    torch.testing.assert_close(dict(other.visual.state_dict()), visual, rtol=0, atol=0)


def test_digest_depends_on_every_image_weight_and_on_no_text_weight(checkpoint: Path, state: dict[str, Tensor]) -> None:
    def digest(name: str, index: int) -> str:
        changed = load_file(checkpoint)
        flat = changed[name].view(-1)
        flat[index] = torch.nextafter(flat[index], torch.tensor(torch.inf))  # the smallest change there is
        save_file(changed, checkpoint.with_name("changed.safetensors"))
        return load_backbone(TINY, str(checkpoint.with_name("changed.safetensors"))).weights_sha256

    original = load_backbone(TINY, str(checkpoint)).weights_sha256
    images = [name for name in state if name.startswith("visual.")]
    digests = [digest(name, -1) for name in images]
    assert len({original, *digests}) == len(images) + 1
    assert digest("token_embedding.weight", 0) == original


def test_digest_sees_names_dtypes_and_shapes_and_no_order() -> None:
    values = torch.arange(6.0)
    given = {"a": values.view(2, 3), "b": torch.ones(4)}
    others = (
        {"a": values.view(3, 2), "b": torch.ones(4)},
        {"a": values.view(2, 3), "c": torch.ones(4)},
        {"a": values.view(2, 3), "b": torch.ones(4, dtype=torch.float64)},
        {"a": values.view(2, 3), "b": torch.ones(4).view(torch.int32)},
    )
    assert len({weights_sha256(given), *map(weights_sha256, others)}) == 5
    transposed = {"b": torch.ones(4), "a": values.view(2, 3).T.contiguous().T}
    assert weights_sha256(transposed) == weights_sha256(given)


def test_a_half_precision_file_has_the_digest_of_its_values(state: dict[str, Tensor], tmp_path: Path) -> None:
    half = {name: tensor.half() for name, tensor in state.items()}
    save_file(half, tmp_path / "half.safetensors")
    save_file({name: tensor.float() for name, tensor in half.items()}, tmp_path / "full.safetensors")
    first, second = (load_backbone(TINY, str(tmp_path / f"{name}.safetensors")) for name in ("half", "full"))
    assert first.weights_sha256 == second.weights_sha256


def test_a_tag_brings_its_weights_and_preprocessing(
    checkpoint: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    tag: dict[str, Any] = {
        "file": str(checkpoint),
        "quick_gelu": True,
        "mean": (0.1, 0.2, 0.3),
        "interpolation": "bilinear",
    }
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, f"{TINY}-quickgelu", {"mine": tag})
    backbone = load_backbone(f"{TINY}-quickgelu", "mine")
    whole = open_clip.create_model(f"{TINY}-quickgelu", "mine")
    assert backbone.preprocess_config == whole.visual.preprocess_cfg
    assert backbone.preprocess_config["interpolation"] == "bilinear"
    torch.testing.assert_close(dict(backbone.visual.state_dict()), dict(whole.visual.state_dict()), rtol=0, atol=0)


def test_random_weights_follow_the_seed_and_leave_the_generator_alone(state: dict[str, Tensor]) -> None:
    def digest(seed: int) -> str:
        return load_backbone(TINY, None, random_weights=True, seed=seed).weights_sha256

    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert digest(0) == digest(0) != digest(1)
    assert torch.equal(torch.get_rng_state(), before)


def test_loading_draws_no_random_numbers_and_logs_nothing(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = torch.get_rng_state()
    load_backbone(TINY, str(checkpoint))
    assert torch.equal(torch.get_rng_state(), before)
    assert not caplog.records
