"""The text tower against open_clip's own and transformers', and every way in which a model has none."""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer, default_bpe
from safetensors.torch import load_file, save_file
from torch import Tensor

from vcache.extract import text as text_module
from vcache.extract.backbone import load_backbone
from vcache.extract.text import FrozenTextTower, NoTextTower, check_text_tower, load_text_tower
from vcache.extract.weights import ActivationMismatch, RandomWeightsRefused, find_architecture

TEXTS = ["a", "wave", "clap hands", "", "Jump, jump!", "über", "an in the on to be or at", "<end_of_text> more"]
CONTEXT = 11


@pytest.fixture(scope="module")
def tower(worded_clip: Path) -> FrozenTextTower:
    return load_text_tower(f"local-dir:{worded_clip}", None)


@pytest.fixture(scope="module")
def oracle(worded_clip: Path) -> Callable[[list[str]], Tensor]:
    """open_clip's model and tokenizer."""
    model = open_clip.create_model(f"local-dir:{worded_clip}").eval()
    tokenizer = SimpleTokenizer(bpe_path=str(worded_clip / "bpe_tiny.txt.gz"), context_length=CONTEXT)

    def encode(texts: list[str]) -> Tensor:
        with torch.no_grad():
            return model.encode_text(tokenizer(texts))

    return encode


@pytest.fixture
def folder(worded_clip: Path, tmp_path: Path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(worded_clip, tmp_path / "clip"))


def configure(folder: Path, **text: Any) -> None:
    """Change its text_cfg; None takes a field out."""
    path = folder / "open_clip_config.json"
    content = json.loads(path.read_text())
    config = content["model_cfg"]["text_cfg"] | text
    content["model_cfg"]["text_cfg"] = {name: value for name, value in config.items() if value is not None}
    path.write_text(json.dumps(content))


def weights_in(folder: Path) -> dict[str, Tensor]:
    """Copies: the file may be written over."""
    return {name: tensor.clone() for name, tensor in load_file(folder / "open_clip_model.safetensors").items()}


def rewrite_weights(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(change(weights_in(folder)), folder / "open_clip_model.safetensors")


def refuse(message: str, model: str | Path, pretrained: str | None = None) -> None:
    with pytest.raises(NoTextTower, match=message) as raised:
        load_text_tower(f"local-dir:{model}" if isinstance(model, Path) else model, pretrained)
    assert "\n" not in str(raised.value)


def test_embeddings_are_those_of_open_clip(tower: FrozenTextTower, oracle: Callable[[list[str]], Tensor]) -> None:
    torch.testing.assert_close(tower.encode(TEXTS), oracle(TEXTS), rtol=1e-5, atol=1e-6)


def test_a_text_has_the_same_embedding_beside_any_others(
    tower: FrozenTextTower, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = tower.encode(TEXTS)
    monkeypatch.setattr(text_module, "_BATCH", 3)
    torch.testing.assert_close(tower.encode(TEXTS[::-1]).flip(0), together, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tower.encode(TEXTS[2:3]), together[2:3], rtol=1e-5, atol=1e-6)
    assert tower.encode([]).shape == (0, 20)


def test_a_text_longer_than_the_context_keeps_its_end_and_is_counted(
    tower: FrozenTextTower, oracle: Callable[[list[str]], Tensor]
) -> None:
    fits, long = (
        "abcdefghi",
        "abcdefghij",
    )  # no merge of the vocabulary joins these: 9 and 10 tokens, with start and end 11 and 12
    texts = [fits, long, long * 5]
    torch.testing.assert_close(tower.encode(texts), oracle(texts), rtol=1e-5, atol=1e-6)
    assert tower.count_cut([fits]) == 0 and tower.count_cut(texts) == 2


def test_clips_vocabulary_gives_the_embeddings_of_transformers() -> None:
    """A random CLIP under the names of Hugging Face, whose implementation is another one."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = {
        "embed_dim": 20,
        "quick_gelu": True,
        "vision_cfg": {"layers": 1, "width": 8, "head_width": 8, "patch_size": 16},
    }
    text = {"context_length": 16, "vocab_size": 49408, "width": 24, "heads": 3, "layers": 2}
    theirs = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=49408, hidden_size=24, intermediate_size=96, projection_dim=20, num_hidden_layers=2,
            num_attention_heads=3, max_position_embeddings=16, hidden_act="quick_gelu", eos_token_id=49407,
        )
    ).eval()  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-text", config | {"text_cfg": text})
        tower = load_text_tower("tiny-text", None, random_weights=True, seed=4)
    theirs.load_state_dict(_under_their_names(tower.clip.state_dict()), strict=True)
    texts = ["abseiling", 'celebrating "a goal"', "Pushing something from left to right"]
    ids = SimpleTokenizer(context_length=16)(texts)
    with torch.no_grad():
        expected = theirs(input_ids=ids).text_embeds
    torch.testing.assert_close(tower.encode(texts), expected, rtol=1e-5, atol=1e-6)


def _under_their_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    named = {
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
        "text_projection.weight": state["text_projection"].T.contiguous(),
    }
    words = {
        "ln_final": "text_model.final_layer_norm", "transformer.resblocks": "text_model.encoder.layers",
        "ln_1": "layer_norm1", "ln_2": "layer_norm2", "c_fc": "fc1", "c_proj": "fc2", "attn.out_proj": "self_attn.out_proj",
    }  # fmt: skip
    for name, tensor in state.items():
        theirs = name
        for ours, word in words.items():
            theirs = theirs.replace(ours, word)
        if "in_proj" in name:
            lead, kind = theirs.split("attn.in_proj_")
            named |= {
                f"{lead}self_attn.{which}_proj.{kind}": part for which, part in zip("qkv", tensor.chunk(3), strict=True)
            }
        elif theirs.startswith("text_model."):
            named[theirs] = tensor
    return named


def test_the_towers_belong_together_and_the_text_is_part_of_no_feature(worded_clip: Path, folder: Path) -> None:
    tower, backbone = (load(f"local-dir:{worded_clip}", None) for load in (load_text_tower, load_backbone))
    assert (tower.model, tower.visual_sha256) == (backbone.facts.model, backbone.weights_sha256)
    configure(folder, context_length=77, heads=6)
    rewrite_weights(folder, lambda state: state | {"ln_final.bias": state["ln_final.bias"] + 1})
    other = load_backbone(f"local-dir:{folder}", None)
    assert (other.facts.model, other.weights_sha256) == (backbone.facts.model, backbone.weights_sha256)
    configure(folder, context_length=CONTEXT, heads=3)
    assert load_text_tower(f"local-dir:{folder}", None).weights_sha256 != tower.weights_sha256


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", "custom.pt", "module.pt"])
def test_every_form_of_a_checkpoint_gives_the_same_tower(
    suffix: str, tower: FrozenTextTower, folder: Path, tmp_path: Path
) -> None:
    state = weights_in(folder)
    (folder / "open_clip_model.safetensors").unlink()
    if suffix == "custom.pt":  # open_clip's CustomTextCLIP, with a logit scale of shape (1,)
        state = {n if n.startswith(("visual.", "logit_")) else f"text.{n}": x for n, x in state.items()}
        state["logit_scale"] = state["logit_scale"].reshape(1)
    if suffix == "module.pt":
        state = {f"module.{name}": tensor for name, tensor in state.items()}
    path = folder / f"w{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save({"state_dict": state}, path)
    read = load_text_tower(f"local-dir:{folder}", None)
    assert read.weights_sha256 == tower.weights_sha256 and read.logit_scale == tower.logit_scale
    torch.testing.assert_close(read.encode(TEXTS), tower.encode(TEXTS), rtol=0, atol=0)


@pytest.mark.filterwarnings(
    "ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning"
)
def test_an_archive_of_torchscript_gives_the_same_tower(tower: FrozenTextTower, folder: Path) -> None:
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    (folder / "open_clip_model.safetensors").unlink()
    images, ids = torch.zeros(1, 3, 32, 32), torch.zeros(1, CONTEXT, dtype=torch.long)
    torch.jit.trace(model, (images, ids), check_trace=False).save(str(folder / "a.pt"))
    assert load_text_tower(f"local-dir:{folder}", None).weights_sha256 == tower.weights_sha256


def test_random_weights_come_from_the_seed_alone(worded_clip: Path) -> None:
    def digest(seed: int) -> str:
        torch.rand(3)
        return load_text_tower(f"local-dir:{worded_clip}", None, random_weights=True, seed=seed).weights_sha256

    before = torch.random.get_rng_state()
    assert digest(1) == digest(1) != digest(2)
    torch.random.set_rng_state(before)
    made = load_text_tower(f"local-dir:{worded_clip}", None, random_weights=True, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    expected = load_backbone(f"local-dir:{worded_clip}", None, random_weights=True, seed=1).weights_sha256
    assert made.visual_sha256 == expected


def test_the_tower_stays_frozen(tower: FrozenTextTower) -> None:
    assert not tower.train().training and not any(parameter.requires_grad for parameter in tower.parameters())
    assert not tower.encode(["a"]).requires_grad


# What has no text tower.


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("roberta-ViT-B-32", "the transformer roberta-base of Hugging Face"),
        ("coca_ViT-B-32", "a class token"),
        ("ViT-L-14-CLIPA", "the tokenizer bert-base-uncased, which would have to be downloaded"),
    ],
)
def test_other_text_towers_are_named(model: str, words: str) -> None:
    with pytest.raises(NoTextTower, match=rf"^{model}: its text tower has {words}; vcache runs CLIP's own"):
        check_text_tower(model, None)


def test_every_plain_clip_of_open_clip_has_one() -> None:
    for model in ("ViT-B-32", "ViT-B-16-quickgelu", "ViT-L-14-quickgelu", "ViT-L-14-336", "ViT-H-14", "ViT-bigG-14"):
        check_text_tower(model, None)
        assert find_architecture(model, None).text["vocab_size"] == 49408


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ({"pool_type": "last"}, "the pooling 'last', not that at the end of the text"),
        ({"no_causal_mask": True}, "no causal mask"),
        ({"proj_bias": True}, "another projection than a matrix"),
        ({"tokenizer_kwargs": {"bpe_path": "/etc/passwd"}}, "a tokenizer with settings of its own"),
    ],
)
def test_what_the_tower_does_not_compute_is_refused(text: dict[str, Any], words: str, folder: Path) -> None:
    configure(folder, **text)
    refuse(rf"its text tower has {words}; ", folder)


def test_a_configuration_without_text_or_with_a_strange_one(folder: Path) -> None:
    configure(folder, colour="red")
    refuse("its text_cfg is not one of open_clip: .*colour", folder)
    content = json.loads((folder / "open_clip_config.json").read_text())
    del content["model_cfg"]["text_cfg"]
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    refuse("its configuration has no text_cfg; vcache runs", folder)


def test_a_vocabulary_of_another_size_is_refused(folder: Path) -> None:
    """open_clip gives ids of 49408 words where nobody names the file."""
    (folder / "bpe_tiny.txt.gz").rename(folder / "words.gz")
    refuse(
        r"knows 520 tokens, and CLIP's vocabulary has 49408\. Put the file .* into the folder as bpe\*\.txt\.gz", folder
    )
    lines = gzip.decompress((folder / "words.gz").read_bytes()).decode()
    for content in (lines + "\n", lines.rsplit("\n", 1)[0], lines.replace(lines.split("\n")[2], lines.split("\n")[1])):
        (folder / "bpe.txt.gz").write_bytes(gzip.compress(content.encode()))
        refuse(r"knows 520 tokens, and its vocabulary .*bpe\.txt\.gz has \d+\.$", folder)
    (folder / "bpe2.txt.gz").write_bytes(b"")
    refuse(r"holds several vocabularies \(bpe\.txt\.gz, bpe2\.txt\.gz\): leave one", folder)


def test_open_clips_own_vocabulary_has_the_size_that_is_reckoned_with() -> None:
    assert SimpleTokenizer().vocab_size == text_module._CLIP_VOCABULARY
    with gzip.open(default_bpe()) as file:
        assert len(file.read()) < text_module._MAX_VOCABULARY_BYTES // 4


def test_a_checkpoint_without_text_or_with_another_one(folder: Path) -> None:
    rewrite_weights(folder, lambda state: {n: x for n, x in state.items() if n != "transformer.resblocks.1.ln_1.bias"})
    refuse(r"does not fit the text tower of .*: weights 1 missing \(transformer.resblocks.1.ln_1.bias\)\.$", folder)
    rewrite_weights(folder, lambda state: state | {"transformer.resblocks.2.ln_1.bias": torch.zeros(24)})
    refuse(r"weights 1 missing .*, 1 left over \(transformer.resblocks.2.ln_1.bias\)\.$", folder)
    rewrite_weights(folder, lambda state: {n: x for n, x in state.items() if n.startswith("visual.")})
    refuse(r"open_clip_model.safetensors holds no text tower under open_clip's names", folder)
    assert load_backbone(f"local-dir:{folder}", None).facts.width == 48


def test_what_is_wrong_with_the_weights_themselves_is_said_as_of_images(folder: Path) -> None:
    state = weights_in(folder)
    (folder / "open_clip_model.safetensors").write_bytes(b"no weights")
    with pytest.raises(RandomWeightsRefused, match="cannot be read as a checkpoint"):
        load_text_tower(f"local-dir:{folder}", None)
    (folder / "open_clip_model.safetensors").unlink()
    numbers = {name: torch.tensor(1) for name in ("input_resolution", "context_length", "vocab_size")}
    torch.save(state | numbers, folder / "a.pt")  # OpenAI's, which are QuickGELU
    content = json.loads((folder / "open_clip_config.json").read_text())
    content["model_cfg"]["quick_gelu"] = False
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    with pytest.raises(ActivationMismatch, match="were trained with QuickGELU"):
        load_text_tower(f"local-dir:{folder}", None)
