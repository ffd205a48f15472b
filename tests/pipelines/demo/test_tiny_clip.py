"""The packaged tiny CLIP: loads offline, knows its 64 names, is the one its card describes; and its training runs."""

import gzip
import hashlib
import json
import stat
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from vcache.pipelines.demo.render import TINY_CLIP
from vcache.pipelines.demo.stills import COMBINATIONS, SEEN, draw_stills, random_still
from vcache.pipelines.demo.train_tiny_clip import (
    CONFIG,
    CONFIG_FILE,
    NUM_MERGES,
    VOCABULARY_FILE,
    VOCABULARY_SIZE,
    WEIGHTS_FILE,
    Recipe,
    load_tokenizer,
    main,
    random_batch,
    to_model_input,
    write_vocabulary,
    zero_shot,
)


def test_zero_shot_on_the_64_names_is_right_more_often_than_not() -> None:
    model = open_clip.create_model(f"local-dir:{TINY_CLIP}")
    accuracies = zero_shot(model, load_tokenizer(TINY_CLIP), 128)
    assert accuracies["seen"] > 0.65  # chance 0.016
    assert accuracies["held_out_of_16"] > 0.65  # chance 0.062


def test_the_card_the_log_and_the_weights_belong_together() -> None:
    digest = hashlib.sha256((TINY_CLIP / WEIGHTS_FILE).read_bytes()).hexdigest()
    last = json.loads((TINY_CLIP / "log.txt").read_text().splitlines()[-1])
    card = (TINY_CLIP / "MODEL_CARD.md").read_text()
    assert last["sha256"] == digest
    assert digest in card
    for name in ("seen", "held_out", "held_out_of_16"):
        assert f"{last[name]:.1%}" in card


def test_the_packaged_config_and_vocabulary_are_those_of_the_script(tmp_path: Path) -> None:
    assert json.loads((TINY_CLIP / CONFIG_FILE).read_text()) == CONFIG
    write_vocabulary(tmp_path / "again.gz")
    # Unpacked, since another zlib may pack the same text into other bytes.
    assert gzip.decompress((TINY_CLIP / VOCABULARY_FILE).read_bytes()) == gzip.decompress(
        (tmp_path / "again.gz").read_bytes()
    )


def test_the_tokenizer_has_the_size_of_the_model_and_knows_every_word() -> None:
    tokenizer = load_tokenizer(TINY_CLIP)
    assert tokenizer.vocab_size == VOCABULARY_SIZE == 2 * 256 + NUM_MERGES + 2
    ids = tokenizer(["an orange moon", "zyzzyva ☃"])
    assert ids.shape == (2, 24)
    assert ids.max() < VOCABULARY_SIZE
    assert tokenizer.decode([i for i in ids[0].tolist() if 0 < i < VOCABULARY_SIZE - 2]).strip() == "an orange moon"


def test_our_shortcut_equals_the_preprocessing_of_the_config() -> None:
    pictures = draw_stills([random_still(np.random.default_rng(2), COMBINATIONS) for _ in range(3)])
    _, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{TINY_CLIP}")
    images = torch.stack([preprocess(Image.fromarray(picture.numpy())) for picture in pictures])
    torch.testing.assert_close(to_model_input(pictures), images)


def test_no_batch_says_the_same_twice() -> None:
    recipe = Recipe(steps=10)
    rng = np.random.default_rng(0)
    assert recipe.easy_steps == 7
    for step, size in ((0, 48), (6, 48), (7, 96), (9, 96)):
        batch = random_batch(rng, step, recipe)
        assert len({still.caption for still in batch}) == len(batch) == size
        assert {still.combination for still in batch} == set(SEEN)


def test_two_steps_of_training_write_a_model_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--out", str(tmp_path / "model"), "--steps", "2", "--test-stills", "20"])
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        CONFIG_FILE,
        VOCABULARY_FILE,
        WEIGHTS_FILE,
        "log.txt",
    }
    assert stat.S_IMODE((tmp_path / "model" / WEIGHTS_FILE).stat().st_mode) == 0o644
    first, last = map(json.loads, (tmp_path / "model/log.txt").read_text().splitlines())
    assert first["recipe"]["steps"] == last["step"] == 2
    assert json.loads(capsys.readouterr().out)["seen"] == last["seen"] < 0.2
