"""vcache few-shot: nested draws by seed, each run what it is alone, CLIP without training beside them, table, curve, resume."""

import csv
import io
import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from named import E, NamedHead, named_store
from PIL import Image
from safetensors.torch import load_file

from vcache.heads import registry
from vcache.pipelines.few_shot import FewShot, is_few_shot, zero_shot_metrics
from vcache.pipelines.few_shot_chart import few_shot_chart
from vcache.pipelines.few_shot_members import few_shot_members, parse_shots, variant_of
from vcache.pipelines.few_shot_results import FewShotTable, few_shot_csv, few_shot_markdown, few_shot_table
from vcache.pipelines.line_chart import COLOURS
from vcache.pipelines.runs import Run, RunError
from vcache.pipelines.settings import SettingError
from vcache.pipelines.training.config import TrainingConfig
from vcache.pipelines.training.group import TrainingEvents
from vcache.pipelines.training.preparation import open_training_store, prepare_head
from vcache.pipelines.training.reports import EpochReport
from vcache.pipelines.training.stream import open_stream
from vcache.pipelines.training.sweep import Sweep, run_sweep
from vcache.pipelines.training.sweep_plan import plan_sweep
from vcache.pipelines.training.sweep_results import MemberResult
from vcache.pipelines.training.sweep_spec import SweepMember
from vcache.pipelines.training.train_head import train_head
from vcache.pipelines.training.world import joined_world
from vcache.store.groups import write_manifest
from vcache.store.reader import FeatureStore

Vcache = Callable[..., tuple[int, str, str]]
CLASSES = ("jump", "run", "clap")
SHORT = {"epochs": "2", "batch_size": "16", "device": "cpu", "checkpoint_minutes": "0"}


@pytest.fixture(autouse=True)
def _named_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._HEADS, "named", NamedHead)


def looks(video: str) -> np.ndarray:
    """The text of the class that the name begins with; of "as" videos that of another."""
    seen = video.split("-")[0] if "-as-" not in video else video.split("-")[2]
    noise = np.random.default_rng(list(video.encode())).normal(size=E)
    return np.eye(E)[CLASSES.index(seen)] + 0.05 * noise


VAL = ("jump-0", "jump-1", "run-2", "run-as-clap-3", "clap-4", "clap-5", "clap-as-jump-6", "clap-7")
ZERO_SHOT = 6 / 8


@pytest.fixture
def store(tmp_path: Path) -> Path:
    train = [(f"{name}-{i}", name) for name in CLASSES for i in range(6)]
    val = [(video, video.split("-")[0]) for video in VAL]
    return named_store(tmp_path / "toy.zarr", CLASSES, {"train": train, "val": val}, embed=looks)


@pytest.fixture
def fixed(store: Path) -> dict[str, str]:
    return {**SHORT, "store": str(store)}


def begin(members: tuple[SweepMember, ...], shots: tuple[int | None, ...], out: Path) -> FewShot:
    return FewShot.create(out, plan_sweep(members), shots)


def test_shots_are_numbers_or_all_in_the_order_of_the_table() -> None:
    assert parse_shots("5, 1,ALL,3") == (1, 3, 5, None)
    assert parse_shots("16") == (16,)
    for wrong, words in (
        ("0,1", "'0' is no number of videos.*Zero-shot stands beside the others unasked"),
        ("1,many", "'many' is no number of videos, nor all, as in --shots 1,3,5,all"),
        ("1,,2", "'' is no number"),
        ("3,1,3", "a number comes twice"),
        ("all,all", "a number comes twice"),
    ):
        with pytest.raises(SettingError, match=words):
            parse_shots(wrong)


def test_each_seed_is_one_of_the_videos_too(fixed: dict[str, str]) -> None:
    members = few_shot_members("linear", fixed, {"lr": ("1e-3", "1e-2")}, (1, 3, None))
    assert len(members) == 2 * 3 * 3
    assert all(member.config.data_seed == member.config.seed for member in members)
    assert {(m.config.shots, m.config.seed) for m in members} == {(s, n) for s in (1, 3, None) for n in range(3)}
    last = members[8]
    assert (last.label, last.folder) == ("lr=1e-3 shots=all", "linear-lr1e-3-shots_all-seed2")
    assert variant_of(last) == {"lr": "1e-3"} and last.varied["shots"] == "all"
    (one,) = few_shot_members("linear", fixed, {}, (4,), 1)
    assert (one.config.shots, one.label, variant_of(one)) == (4, "linear", {})
    assert {m.config.seed for m in few_shot_members("linear", {**fixed, "seed": "7"}, {}, (1, 2))} == {7}


@pytest.mark.parametrize(
    ("settings", "grid", "words"),
    [
        ({"fraction": "0.5"}, {}, "fraction is what few-shot varies itself. Choose videos with --shots"),
        ({}, {"shots": ("1", "2")}, "shots is what few-shot varies itself. Say them with --shots"),
        ({"data_seed": "3"}, {}, "data_seed is what few-shot varies itself. Each seed draws its own videos"),
    ],
)
def test_what_chooses_other_videos_is_refused(
    fixed: dict[str, str], settings: dict[str, str], grid: dict[str, tuple[str, ...]], words: str
) -> None:
    with pytest.raises(SettingError, match=words):
        few_shot_members("linear", {**fixed, **settings}, grid, (1, 2))


def test_a_file_names_several_heads_and_says_nothing_of_the_videos(fixed: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "heads.toml"
    file.write_text("[common]\nseeds = 2\n[[head]]\nhead = 'linear'\n[[head]]\nhead = 'named'\n")
    members = few_shot_members(str(file), fixed, {}, (1, None))
    assert len(members) == 2 * 2 * 2 and {m.config.head for m in members} == {"linear", "named"}
    file.write_text("[[head]]\nhead = 'linear'\ndata_seed = 4\n")
    with pytest.raises(SettingError, match=r"data_seed is said in .*heads.toml. Each seed draws"):
        few_shot_members(str(file), fixed, {}, (1, None))


def trained_on(member: SweepMember) -> set[str]:
    """Ids of the videos."""
    with joined_world(torch.device("cpu")) as world, open_training_store(member.config) as store:
        stream = open_stream([prepare_head(member.config, store, world.device)], store, world.device, world)
        return {store.videos("train").ids[row] for row in stream.train.rows}


def test_the_videos_of_few_shots_are_among_those_of_more_and_differ_by_seed(fixed: dict[str, str]) -> None:
    members = few_shot_members("named", fixed, {}, (1, 2, None), 2)
    drawn = {(m.config.shots, m.config.seed): trained_on(m) for m in members}
    for seed in (0, 1):
        assert drawn[1, seed] < drawn[2, seed] < drawn[None, seed]
        assert [len(drawn[shots, seed]) for shots in (1, 2, None)] == [3, 6, 18]
        assert {video.split("-")[0] for video in drawn[1, seed]} == {*CLASSES}
    assert drawn[1, 0] != drawn[1, 1] and drawn[None, 0] == drawn[None, 1]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "head.safetensors")


def test_each_run_is_what_it_is_alone_and_the_table_is_of_the_runs(fixed: dict[str, str], tmp_path: Path) -> None:
    """The batch of 16 is larger than two videos of each of three classes."""
    shots = (2, None)
    members = few_shot_members("named", fixed, {"lr": ("1e-2", "3e-1")}, shots, 2)
    found = begin(members, shots, tmp_path / "f")
    assert len(found.sweep.plan.groups) == 4  # of other videos
    summary = run_sweep(found.sweep)
    assert {result.status for result in summary.results} == {"finished"}
    for member in (members[1], members[-1]):
        train_head(replace(member.config, out=tmp_path / "alone" / member.folder))
        alone = weights(tmp_path / "alone" / member.folder)
        torch.testing.assert_close(weights(found.sweep.path / member.folder), alone, rtol=0, atol=0)
    table = found.table()
    assert [row.variant for row in table.rows] == [{"lr": "1e-2"}, {"lr": "3e-1"}] and table.metric == "top1"
    for row in table.rows:
        assert row.zero_shot is not None and row.zero_shot["top1"] == ZERO_SHOT
        for place, one in enumerate(shots):
            runs = [m for m in members if m.config.shots == one and variant_of(m) == row.variant]
            top1 = [Run.open(found.sweep.path / m.folder).metrics()[-1]["val_top1"] for m in runs]
            assert table.mean(row, place) == pytest.approx(np.mean(top1))
            assert table.std(row, place) == pytest.approx(np.std(top1, ddof=1))


def test_zero_shot_is_that_of_the_classes_and_of_heads_that_classify_by_text(
    fixed: dict[str, str], tmp_path: Path
) -> None:
    (member,) = few_shot_members("linear", fixed, {}, (1,), 1)
    assert begin((member,), (1,), tmp_path / "linear").zero_shot == (None,)
    without = few_shot_members("named", {**fixed, "leave_out": "jump"}, {}, (1, None), 1)
    found = begin(without, (1, None), tmp_path / "named")
    # run-as-clap is wrong among run and clap; what looks like jump is called by the noise
    values = {one["top1"] for one in found.zero_shot if one}
    assert len(values) == 1 and values < {4 / 6, 5 / 6, 1.0} and len(found.zero_shot) == 2
    again = FewShot.of(Sweep.open(tmp_path / "named"))
    assert again is not None and (again.shots, again.zero_shot) == ((1, None), found.zero_shot)
    assert is_few_shot(tmp_path / "named") and not is_few_shot(tmp_path)


def test_text_of_another_encoder_is_not_compared_without_training(fixed: dict[str, str], store: Path) -> None:
    """Also where it happens to have the width of CLIP's."""
    members = few_shot_members("text4vis", {**fixed, "templates": "label"}, {}, (1,), 1)
    with FeatureStore.open(store) as opened:
        manifest = opened.manifest
    (own,) = zero_shot_metrics(members)
    assert own is not None and own["top1"] == ZERO_SHOT
    text = {"encoders": {"label": {"encoder": "distilbert", "width": E}}}
    write_manifest(store, replace(manifest, facts={**manifest.facts, "text": text}))
    assert zero_shot_metrics(members) == (None,)


def test_what_failed_or_waits_has_a_dash_and_its_reason(fixed: dict[str, str], tmp_path: Path) -> None:
    members = few_shot_members("linear", fixed, {"lr": ("1e-2", "1e30")}, (1, 2), 1)
    found = begin(members, (1, 2), tmp_path / "f")
    found.write()
    lines = (tmp_path / "f" / "few-shot.md").read_text().splitlines()
    assert lines[:3] == ["| lr | 1-shot | 2-shot |", "| --- | --- | --- |", "| 1e-2 | - | - |"]
    run_sweep(found.sweep)
    found.write()
    text = (tmp_path / "f" / "few-shot.md").read_text()
    assert text.splitlines()[3] == "| 1e30 | failed | failed |" and text.splitlines()[2].startswith("| 1e-2 | **")
    assert "±" not in text and "\n- failed: lr=1e30 shots=1 seed=0: " in text


def member(head: str, shots: int | None, **varied: str) -> SweepMember:
    config = TrainingConfig(head=head, shots=shots)
    word = "all" if shots is None else str(shots)
    label = " ".join([head, *(f"{name}={value}" for name, value in varied.items()), f"shots={word}"])
    return SweepMember(label=label, name=label, folder=label, varied={**varied, "shots": word}, config=config)


def result(member: SweepMember, seed: int, top1: float) -> MemberResult:
    return MemberResult(
        label=member.label,
        head=member.config.head,
        varied=member.varied,
        seed=seed,
        status="finished",
        metrics={"top1": top1, "top5": 0.9},
    )


TOP1 = {
    ("text4vis", 1): (0.50, 0.60),
    ("text4vis", None): (0.80, 0.80),
    ("linear", 1): (0.10, 0.30),
    ("linear", None): (0.85, 0.95),
}


def drawn_up(zero_shot: dict[str, float]) -> tuple[FewShotTable, list[MemberResult]]:
    """Two heads, one of them with text; columns 1 and all, and one of which there is nothing."""
    members, results, known = [], [], []
    for (head, shots), values in TOP1.items():
        for seed, value in enumerate(values):
            members.append(member(head, shots))
            results.append(result(members[-1], seed, value))
            known.append({"top1": zero_shot[head], "mean_average_precision": None} if head in zero_shot else None)
    return few_shot_table(members, results, (1, 4, None), known), results


def test_the_table_has_zero_shot_first_and_the_best_of_each_column_in_bold() -> None:
    table, results = drawn_up({"text4vis": 0.45})
    assert few_shot_markdown(table, results).splitlines() == [
        "| head | zero-shot | 1-shot | 4-shot | all |",
        "| --- | --- | --- | --- | --- |",
        "| text4vis | 45.0 | **55.0 ± 7.1** | - | 80.0 ± 0.0 |",
        "| linear | - | 20.0 ± 14.1 | - | **90.0 ± 7.1** |",
        "",
        "top-1 in per cent on the validation split after the last epoch: mean ± sample standard deviation over the seeds, each "
        "with other videos.",
    ]
    rows = list(csv.DictReader(io.StringIO(few_shot_csv(table))))
    assert [(row["head"], row["shots"]) for row in rows] == [
        ("text4vis", "0"),
        ("text4vis", "1"),
        ("text4vis", "all"),
        ("linear", "1"),
        ("linear", "all"),
    ]
    assert float(rows[1]["mean"]) == pytest.approx(0.55) and float(rows[1]["std"]) == pytest.approx(np.sqrt(0.005))
    assert (float(rows[3]["least"]), float(rows[3]["most"])) == (0.1, 0.3)
    without, results = drawn_up({})
    assert few_shot_markdown(without, results).splitlines()[2] == "| text4vis | **55.0 ± 7.1** | - | 80.0 ± 0.0 |"


@pytest.mark.parametrize(
    ("zero_shot", "dashed"),
    [({}, []), ({"text4vis": 0.45, "linear": 0.45}, [(70, 70, 70)]), ({"text4vis": 0.4, "linear": 0.7}, COLOURS[:2])],
)
def test_the_curve_has_a_line_for_each_variant_and_a_level_for_each_zero_shot(
    zero_shot: dict[str, float], dashed: Sequence[tuple[int, int, int]]
) -> None:
    table, _ = drawn_up(zero_shot)
    image = np.asarray(few_shot_chart(table, "toy.zarr"))
    assert all((image == colour).all(axis=-1).sum() > 800 for colour in COLOURS[:2])
    heights = {colour: np.argwhere((image == colour).all(axis=-1)) for colour in (*COLOURS[:2], (70, 70, 70))}
    for colour, found in heights.items():
        levels = [y for y, count in zip(*np.unique(found[:, 0], return_counts=True), strict=True) if count > 150]
        assert bool(levels) == (colour in dashed)


class Killed(BaseException):
    """As nothing catches SIGKILL."""


def test_the_command_draws_table_and_curve_and_goes_on_after_a_kill(
    vcache: Vcache, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    line = f"few-shot named {store} --shots 1,all --seeds 2 --grid lr=1e-2,3e-1 --epochs 2 --batch-size 16 --device cpu"
    left = iter(range(5))

    def killed(report: EpochReport) -> None:
        if next(left, None) is None:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(
            "vcache.pipelines.training.group.TrainingEvents",
            lambda **callbacks: TrainingEvents(**{**callbacks, "on_epoch": killed}),
        )
        with pytest.raises(Killed):
            vcache(f"{line} --out {out}")
    assert (out / "few-shot.md").is_file()  # what there was
    status, printed, err = vcache(f"resume {out}", columns=80)
    assert status == 0, err
    assert "zero-shot" in printed and "75.0" in printed and "few-shot.csv, few-shot.md, few-shot.png" in printed
    status, again, _ = vcache(f"resume {out}", columns=80)
    assert status == 0 and again == printed
    status, told, _ = vcache(f"resume {out} --json")
    rows = json.loads(told)["few_shot"]
    assert [row["variant"] for row in rows] == [{"lr": "1e-2"}, {"lr": "3e-1"}]
    with (out / "few-shot.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["shots"] for line in lines] == ["0", "1", "all"] * 2
    for row, of_row in zip(rows, (lines[:3], lines[3:]), strict=True):
        assert row["zero_shot"] == float(of_row[0]["mean"]) == ZERO_SHOT and of_row[0]["std"] == ""
        for one in of_row[1:]:
            assert row["shots"][one["shots"]] == {"mean": float(one["mean"]), "std": float(one["std"])}
            assert (one["runs"], one["done"], one["metric"]) == ("2", "2", "top1")
    with Image.open(out / "few-shot.png") as image:
        pixels = np.asarray(image)
    for colour in (*COLOURS[:2], (70, 70, 70)):  # two lines and the level, one over the other, and their names
        assert (pixels == colour).all(axis=-1).any()


def test_errors_and_a_dry_run_of_the_command(
    vcache: Vcache, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    there = {path.name for path in tmp_path.iterdir()}
    status, out, _ = vcache(f"few-shot linear --store {shlex.quote(str(store))} --shots 1,all --seeds 1 --dry-run")
    assert status == 0 and "shots=all  linear-shots_all" in out and "same shots" in out
    for words, told in (
        (f"linear {store} --store other.zarr", "is another store than"),
        (f"linear {store} --shots 0", "Zero-shot stands beside"),
        (f"linear {store} --set shots=3", "shots is what few-shot varies itself"),
        (f"linear {store} --grid lre=1,2", "Did you mean 'lr'"),
    ):
        status, _, err = vcache(f"few-shot {words}")
        assert status in (1, 2) and told in " ".join(err.split())
    assert {path.name for path in tmp_path.iterdir()} == there
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").touch()
    members = few_shot_members("linear", {**SHORT, "store": str(store)}, {}, (1,), 1)
    with pytest.raises(RunError, match="is not empty"):
        begin(members, (1,), tmp_path / "full")
