"""Text models of Hugging Face against transformers called by hand, and every way in which there is none."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_encoder import CONTEXT, WIDTH, WORDS, save_distilbert, save_model
from torch import Tensor

from vcache.extract.text_encoders import FrozenTextEncoder, TextEncoderError, encoder_name, load_text_encoder

TEXTS = ["a video of a person waves.", "jump", "clap hands", "a video of a person clap hands.", "Jump", "unheard words"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    return save_distilbert(tmp_path_factory.mktemp("models") / "tiny-distilbert")


@pytest.fixture(scope="module")
def encoder(folder: Path) -> FrozenTextEncoder:
    return load_text_encoder(str(folder))


def by_hand(folder: Path, texts: list[str], pooling: str) -> Tensor:
    """All texts in one batch, padded to the longest and masked, as transformers' own examples do."""
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = transformers.AutoModel.from_pretrained(folder).eval()(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    return (hidden * mask).sum(1) / mask.sum(1) if pooling == "mean" else hidden[:, 0]


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_embeddings_are_those_of_transformers(folder: Path, pooling: str) -> None:
    encoder = load_text_encoder(str(folder), pooling=pooling)
    assert (encoder.embed_dim, encoder.context_length, encoder.pooling) == (WIDTH, CONTEXT, pooling)
    torch.testing.assert_close(encoder.encode(TEXTS), by_hand(folder, TEXTS, pooling), rtol=1e-5, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.sampled_from(WORDS[5:]), min_size=1, max_size=CONTEXT).map(" ".join), min_size=1))
def test_a_text_has_one_embedding_whatever_is_beside_it(encoder: FrozenTextEncoder, texts: list[str]) -> None:
    together, alone = encoder.encode(texts), torch.cat([encoder.encode([text]) for text in texts])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_long_texts_are_cut_and_counted(encoder: FrozenTextEncoder) -> None:
    fits, long = " ".join(["jump"] * (CONTEXT - 2)), " ".join(["jump"] * (CONTEXT + 9))
    assert encoder.count_cut([fits, long, "wave"]) == 1
    short, cut = encoder.encode([fits, long])
    torch.testing.assert_close(cut, short)


def test_it_stays_frozen_and_in_eval_mode(encoder: FrozenTextEncoder) -> None:
    encoder.train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    torch.testing.assert_close(encoder.encode(TEXTS), encoder.encode(TEXTS), rtol=0, atol=0)


def test_half_precision_weights_are_computed_in_single(folder: Path, tmp_path: Path) -> None:
    half = Path(shutil.copytree(folder, tmp_path / "half"))
    state = {name: x.half() for name, x in load_file(half / "model.safetensors").items()}
    save_file(state, half / "model.safetensors", metadata={"format": "pt"})
    encoder = load_text_encoder(str(half))
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
    assert encoder.weights_sha256 != load_text_encoder(str(folder)).weights_sha256


def test_the_digests_tell_weights_and_tokenizers_apart(folder: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(folder, tmp_path / "moved"))
    first, second = load_text_encoder(str(folder)), load_text_encoder(str(moved))
    assert first.weights_sha256 == second.weights_sha256 and first.tokens_sha256(TEXTS) == second.tokens_sha256(TEXTS)
    (moved / "vocab.txt").write_text("\n".join([*WORDS[:5], *reversed(WORDS[5:])]))
    third, other = load_text_encoder(str(moved)), load_text_encoder(str(save_distilbert(tmp_path / "other", seed=6)))
    assert third.weights_sha256 == first.weights_sha256 and third.tokens_sha256(TEXTS) != first.tokens_sha256(TEXTS)
    assert other.weights_sha256 != first.weights_sha256 and other.tokens_sha256(TEXTS) == first.tokens_sha256(TEXTS)


SIZES = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_weights_that_no_hidden_state_depends_on_may_be_missing(tmp_path: Path) -> None:
    """transformers draws a pooler anew at each loading."""
    folder = save_model(
        tmp_path / "bert", transformers.BertConfig(vocab_size=len(WORDS), **SIZES), add_pooling_layer=False
    )
    first, second = load_text_encoder(str(folder)), load_text_encoder(str(folder))
    assert first.weights_sha256 == second.weights_sha256
    torch.testing.assert_close(first.encode(TEXTS), second.encode(TEXTS), rtol=0, atol=0)


def test_the_encoder_of_two_parts_is_enough(tmp_path: Path) -> None:
    config = transformers.T5Config(
        vocab_size=len(WORDS), d_model=16, d_kv=4, d_ff=20, num_layers=1, num_heads=2, is_encoder_decoder=False
    )
    folder = save_model(tmp_path / "t5", config)
    state = {name: x for name, x in load_file(folder / "model.safetensors").items() if not name.startswith("decoder.")}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(["clap hands"], return_tensors="pt")
    with torch.no_grad():
        expected = transformers.T5EncoderModel.from_pretrained(folder)(**tokens).last_hidden_state.mean(dim=1)
    torch.testing.assert_close(load_text_encoder(str(folder)).encode(["clap hands"]), expected, rtol=1e-5, atol=1e-6)


def drop_weight(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    save_file(
        {name: x for name, x in state.items() if name != "transformer.layer.1.ffn.lin2.bias"},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (shutil.rmtree, "there is no such folder"),
        (lambda folder: (folder / "config.json").unlink(), "holds no config.json: it is no model of transformers"),
        (lambda folder: (folder / "vocab.txt").unlink(), "holds no vocabulary: put its tokenizer there"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights: it takes model.safetensors"),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
            "holds only pytorch_model.bin, which vcache does not read: it takes model.safetensors",
        ),
        (drop_weight, r"lacks 1 of the weights .*, as transformer\.layer\.1\.ffn\.lin2\.bias: they would be random"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"junk" * 9),
            "cannot be loaded as a text model of transformers: Error while deserializing",
        ),
        (
            lambda folder: (folder / "vocab.txt").write_text("\n".join([*WORDS, "more"])),
            "its tokenizer has 18 tokens, and its model knows 17",
        ),
    ],
    ids=["missing", "no-config", "no-tokenizer", "no-weights", "pickle", "lacks-a-weight", "junk", "another-vocabulary"],
)  # fmt: skip
def test_what_is_no_text_model_is_refused(
    folder: Path, tmp_path: Path, spoil: Callable[[Path], object], words: str
) -> None:
    spoilt = Path(shutil.copytree(folder, tmp_path / "spoilt"))
    spoil(spoilt)
    with pytest.raises(TextEncoderError, match=words):
        load_text_encoder(str(spoilt))


def test_a_model_of_images_is_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "vit", transformers.ViTConfig(image_size=8, patch_size=4, **SIZES))
    with pytest.raises(TextEncoderError, match="holds ViTModel, which gives no hidden states of a text alone"):
        load_text_encoder(str(folder))


def test_without_transformers_the_command_that_installs_it_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(TextEncoderError, match=r"needs the package transformers .*: +pip install transformers"):
        load_text_encoder(str(folder))


def test_of_the_hub_no_pickle_is_downloaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, list[str]]] = []

    def download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    encoder = load_text_encoder("someone/a-model")
    assert (encoder.source, encoder.name) == ("someone/a-model", "a_model")
    assert asked == [("someone/a-model", ["*.json", "*.txt", "*.model", "*.safetensors"])]


def test_a_name_that_the_hub_does_not_give_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, **options: object) -> str:
        raise ConnectionError("no network\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(TextEncoderError, match=r"no model of that name could be downloaded .* \(no network\)\.$"):
        load_text_encoder("someone/a-model")
    with pytest.raises(TextEncoderError, match=r"--encoder \./a-model: there is no such folder\.$"):
        load_text_encoder("./a-model")


def test_another_pooling_is_refused(folder: Path) -> None:
    with pytest.raises(TextEncoderError, match="--pooling max: there are mean and cls"):
        load_text_encoder(str(folder), pooling="max")


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("distilbert/distilbert-base-uncased", "distilbert_base_uncased"),
        ("/models/all-MiniLM-L6-v2/", "all_MiniLM_L6_v2"),
        ("bert.", "bert"),
        ("a--b..c", "a_b_c"),
    ],
)
def test_names_are_letters_digits_and_underscores(source: str, name: str) -> None:
    assert encoder_name(source) == name


def test_a_name_without_a_letter_is_refused() -> None:
    with pytest.raises(TextEncoderError, match="has no name to call its embeddings by"):
        encoder_name("/models/--")
