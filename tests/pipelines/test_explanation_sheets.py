"""The pictures and numbers of an explanation: sizes, order, and where a peak lies on the sheet."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vcache.pipelines.attention_sheets import attention_sheet, cross_frame_sheet
from vcache.pipelines.explanation import Attention, CrossFrame, Explanation, LayerAttention
from vcache.pipelines.explanation_sheets import folder_name, write_explanation
from vcache.pipelines.pictures import Tiling

T, GRID, SIZE = 11, (1, 6), 48
P = GRID[0] * GRID[1]


@pytest.fixture
def explanation(tmp_path: Path) -> Explanation:
    """11 frames of one colour each and a grid of one row; the query looks at patch 4 of frame 9 and at nothing else."""
    images = np.zeros((T, SIZE, SIZE, 3), dtype=np.uint8)
    for t in range(T):
        images[t] = (200, 10 + 20 * t, 3)
    query = np.zeros((T, 1 + P))
    query[9, 5], query[2, 0] = 0.75, 0.25
    before = np.full(GRID, 0.1)
    before[0, 3] = 0.5
    return Explanation(
        run=tmp_path / "run",
        head="EVL",
        video_id="val/a b.mp4",
        split="val",
        row=1,
        truth="jump",
        predictions=(("jump", 0.9), ("wave", 0.1)),
        images=images,
        frame_index=tuple(range(3, 3 + 2 * T, 2)),
        tiling=Tiling(grid=GRID, patch=(48, 8)),
        found=Attention(
            layers=(LayerAttention(number=2, layer=7, query=query, cls=np.full((T, 1 + P), 1 / (1 + P))),),
            cross_frame=CrossFrame(layer=7, frame=10, patch=(0, 4), previous=before, next=None),
        ),
        notes=(),
    )


def places(image: np.ndarray, colour: np.ndarray) -> np.ndarray:
    return np.argwhere((image == colour).all(axis=-1))


def test_frames_are_in_order_eight_beside_each_other_and_the_rest_below(explanation: Explanation) -> None:
    sheet = np.asarray(attention_sheet(explanation, explanation.found))
    found = [places(sheet, image[0, 0]) for image in explanation.images]
    assert {len(where) for where in found} == {192 * 192}  # 48 pixels, four times
    corners = [tuple(where[0]) for where in found]
    assert corners == sorted(corners)
    assert len({y for y, _ in corners[:8]}) == 1 == len({y for y, _ in corners[8:]})
    assert corners[8][0] > corners[0][0] + 3 * 192 and [x for _, x in corners[8:]] == [x for _, x in corners[:3]]


def test_the_query_lights_up_the_patch_it_looks_at_and_no_other(explanation: Explanation) -> None:
    sheet = np.asarray(attention_sheet(explanation, explanation.found)).astype(int)
    top, left = places(sheet, explanation.images[9][0, 0])[0]
    # Below the frame are its number, the map of CLS and what it gives itself, and then the map of the query.
    rows = [y for y in range(top + 2 * 192, len(sheet)) if (sheet[y, left : left + 192].sum(axis=-1) < 600).all()]
    heat = sheet[rows[-192] : rows[-192] + 192, left : left + 192, 0]
    hottest = np.unravel_index(heat.argmax(), heat.shape)[1]
    assert rows[-1] - rows[-192] == 191 and 4 * 32 <= hottest < 5 * 32
    assert heat[:, : 3 * 32].max() < 100 < 150 < heat[:, 4 * 32 + 8 : 5 * 32 - 8].min()


def test_a_patch_of_the_last_frame_has_a_sheet_of_two_frames(explanation: Explanation) -> None:
    assert explanation.found.cross_frame
    sheet = np.asarray(cross_frame_sheet(explanation, explanation.found.cross_frame))
    assert len(places(sheet, explanation.images[9][0, 0])) and len(places(sheet, explanation.images[10][0, 0]))
    assert not len(places(sheet, explanation.images[8][0, 0]))
    assert len(places(sheet, np.array((255, 40, 40))))  # the mark


def test_the_numbers_are_those_of_the_maps(explanation: Explanation, tmp_path: Path) -> None:
    described = write_explanation(explanation, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "explain.json").read_text()) == described
    (layer,) = described["layers"]
    assert layer["frame_share"] == [0, 0, 0.25, 0, 0, 0, 0, 0, 0, 0.75, 0]
    assert layer["cls_share"][2] == 0.25 and layer["most_attended"] == {"frame": 9, "patch": [0, 4], "weight": 0.75}
    assert described["cross_frame"]["previous"] == {"most_attended": [0, 3], "weight": 0.5}
    assert described["cross_frame"]["next"] is None
    assert described["predictions"][0] == {"class": "jump", "probability": 0.9}


def test_pictures_lie_in_the_run_unless_told_otherwise(explanation: Explanation) -> None:
    described = write_explanation(explanation)
    folder = explanation.run / "explain" / "val_a_b.mp4"
    assert described["pictures"] == {
        "attention": str(folder / "attention.png"),
        "cross_frame": str(folder / "cross-frame.png"),
    }
    for path in described["pictures"].values():
        with Image.open(path) as image:
            assert image.format == "PNG" and image.width > 400


@pytest.mark.parametrize(
    ("video_id", "name"), [("a-b_1.mp4", "a-b_1.mp4"), ("../x y", "_x_y"), ("..", "_"), ("wave/é", "wave_é")]
)
def test_no_id_leads_out_of_the_run_folder(video_id: str, name: str) -> None:
    assert folder_name(video_id) == name
