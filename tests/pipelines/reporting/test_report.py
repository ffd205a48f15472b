"""vcache report: what it shows is what the run and `vcache eval` know, also where something is missing."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix
from viewed import D, K, viewed_store

from vcache.heads.linear import LinearHead
from vcache.pipelines.evaluation.evaluate import evaluate
from vcache.pipelines.evaluation.head_evaluation import Evaluation
from vcache.pipelines.evaluation.predictions import Predictions
from vcache.pipelines.evaluation.saving import save_predictions
from vcache.pipelines.reporting.class_sections import classes_section, confusion_section
from vcache.pipelines.reporting.markup import join
from vcache.pipelines.runs import Run
from vcache.store.writer import record_facts

VCache = Callable[..., tuple[int, str, str]]


def text_of(file: Path) -> str:
    """What a reader sees, without pictures, style and script."""
    html = re.sub(r"<(style|script)>.*?</\1>", "", file.read_text(), flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", html)).split())


def with_config(run: Path, **fields: object) -> Path:
    config = {**json.loads((run / "config.json").read_text()), **fields}
    (run / "config.json").write_text(json.dumps(config))
    return run


def test_a_report_has_what_eval_says_and_what_config_json_says(evl_run: Path, vcache: VCache) -> None:
    status, out, err = vcache(f"report {evl_run} --device cpu --explain 2")
    assert (status, err) == (0, "")
    file, metrics = evl_run / "report.html", evaluate(evl_run, device="cpu").metrics
    text, config = text_of(file), Run.open(evl_run).config
    assert f"top-1 {100 * metrics.monitored:.1f}%" in text and f"top-1 {100 * metrics.monitored:.1f}%" in out
    assert f"loss {metrics.loss:.3f}" in text
    for known in (
        config["store_key"],
        config["store"],
        config["store_spec"]["weights_sha256"],
        "mpeg4"[:0],
        "vcache 0.1.0",
    ):
        assert known in text
    assert "lr 0.01 default 0.0004" in text and "mlp_dropout 0.5" in text
    assert text.count("head's query, layer") == 2
    assert "default" not in re.findall(r"weight_decay \S+ (\S+)", text)
    html = file.read_text()
    assert "http" not in re.sub(r"http-equiv", "", html) and 'src="data:image/jpeg' in html
    assert Predictions.load(evl_run / "predictions" / "val-1x1.npz").metrics() == metrics


def test_saved_predictions_are_shown_and_those_of_another_store_are_made_again(evl_run: Path, vcache: VCache) -> None:
    evaluation = evaluate(evl_run, device="cpu")
    # As of a head that is always right, which nobody would get by evaluating.
    scores = 9 * (evaluation.predictions.target_tensor()[:, None] == evaluation.predictions.target_tensor().unique())
    perfect = replace(evaluation.predictions, scores=scores.float().numpy())
    save_predictions(replace(evaluation, predictions=perfect), evl_run)
    assert vcache(f"report {evl_run} --device cpu --no-explain")[0] == 0
    assert "top-1 100.0%" in text_of(evl_run / "report.html")
    for other in (replace(perfect, store_key="0" * 16), replace(perfect, class_names=("a", "b", "c"))):
        save_predictions(replace(evaluation, predictions=other), evl_run)
        assert vcache(f"report {evl_run} --device cpu --no-explain")[0] == 0
        assert f"top-1 {evaluation.metrics.monitored:.1%}" in text_of(evl_run / "report.html")


def test_without_its_store_a_run_tells_what_it_knows_itself(evl_run: Path, vcache: VCache, tmp_path: Path) -> None:
    save_predictions(evaluate(evl_run, device="cpu"), evl_run)
    with_config(evl_run, store=str(tmp_path / "gone.zarr"))
    status, _, err = vcache(f"report {evl_run} --device cpu")
    assert status == 0 and "Reported from the run alone: the store of" in err and "gone.zarr, is not there" in err
    text = text_of(evl_run / "report.html")
    assert "Without the store there are no frames to show." in text and "(not there now)" in text
    assert "circles" not in text and "most confused with" in text  # predictions are saved
    shutil.rmtree(evl_run / "predictions")
    assert "No predictions are saved in the run" in vcache(f"report {evl_run}")[2]
    text = text_of(evl_run / "report.html")
    assert "in the validation after epoch 3" in text and "most confused with" not in text


def test_a_store_that_is_named_has_to_be_there(evl_run: Path, vcache: VCache, tmp_path: Path) -> None:
    status, _, err = vcache(f"report {evl_run} --store {tmp_path / 'other.zarr'}")
    assert status == 1 and "other.zarr" in err and not (evl_run / "report.html").exists()


def test_an_unfinished_run_is_reported_as_far_as_it_came(evl_run: Path, vcache: VCache) -> None:
    (evl_run / "head.safetensors").unlink()
    lines = (evl_run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (evl_run / "metrics.jsonl").write_text(lines[0])
    assert vcache(f"report {evl_run}")[0] == 0
    text = text_of(evl_run / "report.html")
    assert re.search(r"not finished : 1 epoch, \d+ steps so far, of 3 epochs planned", text) and "vcache resume" in text
    (evl_run / "metrics.jsonl").unlink()
    (evl_run / "steps.jsonl").unlink()
    assert vcache(f"report {evl_run}")[0] == 0
    assert "no log of its training" in text_of(evl_run / "report.html")


def test_a_run_without_validation_and_one_without_videos(
    evl_run: Path, vcache: VCache, tmp_path: Path, float32_store: Path
) -> None:
    rows = [json.loads(line) for line in (evl_run / "metrics.jsonl").read_text().splitlines()]
    blank = [{name: None if name.startswith("val_") else value for name, value in row.items()} for row in rows]
    (evl_run / "metrics.jsonl").write_text("".join(json.dumps({**row, "best": False}) + "\n" for row in blank))
    status, _, err = vcache(f"report {evl_run} --device cpu --root {tmp_path / 'nowhere'}")
    assert status == 0 and "Attention is not drawn for" in err and "--root" in err
    text = text_of(evl_run / "report.html")
    assert "no split to validate on" in text and "could not be shown" in text


def test_a_sweep_has_its_table_its_failures_and_its_best_run(
    finished_sweep: Path, vcache: VCache, tmp_path: Path
) -> None:
    out = tmp_path / "sweep.html"
    status, _, err = vcache(f"report {finished_sweep} --out {out} --no-save --videos 1 --device cpu")
    assert (status, err) == (0, "")
    text, html = text_of(out), out.read_text()
    rows = [line.split("|") for line in (finished_sweep / "results.md").read_text().splitlines() if "±" in line]
    means = [cell.strip(" *") for row in rows for cell in row if re.match(r" [*\d.]+ ± ", cell)]
    assert len(means) >= 4 and all(mean in text for mean in means)
    assert "lr=1e30 seed=0 : " in text and "failed" in text
    assert 'href="#best-result"' in html and 'id="best-result"' in html
    assert len(re.findall(r'id="([^"]+)"', html)) == len(set(re.findall(r'id="([^"]+)"', html)))
    assert set(re.findall(r'href="#([^"]+)"', html)) <= set(re.findall(r'id="([^"]+)"', html))
    assert not (finished_sweep / "linear-lr0.1-seed0" / "predictions").exists()


@pytest.mark.parametrize("num_classes", [10, 64, 400])
@pytest.mark.parametrize("several", [False, True])
def test_many_classes_make_no_large_file(
    made_predictions: Callable[..., Predictions], num_classes: int, several: bool
) -> None:
    predictions = made_predictions(4 * num_classes, num_classes, several=several)
    evaluation = Evaluation(
        metrics=predictions.metrics(), kinds=(), predictions=predictions, which="last", num_failed=0
    )
    names = predictions.class_names or ()
    html = join([confusion_section(evaluation, names, "a").content, classes_section(evaluation, "b").content])
    assert len(html) < 700_000
    assert "<0>" not in html and "class &lt;0&gt;" in html
    assert html.count("<tbody>") == (2 if num_classes == 10 else 3)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("report {tmp}/nothing", "is not there"),
        ("report {tmp}", "neither a run nor a sweep"),
        ("report {run}/..", "holds 1 run. Name one of them, as in:  vcache report"),
        ("report {run}/config.json", "is a file; a report is of the folder"),
        ("report {run} --out {tmp}", "is a folder. Name a file:"),
        ("report {run} --out {tmp}/no/such.html", "is not there, so such.html cannot be written"),
        ("report {run} --split tset", "has no split 'tset'"),
    ],
)
def test_errors_say_what_to_do(trained_evl: Path, vcache: VCache, tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "empty").mkdir()
    status, out, err = vcache(line.format(tmp=tmp_path, run=trained_evl))
    assert (status, out) == (1, "") and words in err


def test_a_head_with_a_temporal_encoder_and_stored_pixels(dist_run: Path, vcache: VCache, tmp_path: Path) -> None:
    run = Path(shutil.copytree(dist_run, tmp_path / "dist"))
    status, _, err = vcache(f"report {run} --device cpu --explain 1")
    assert (status, err) == (0, "")
    text, html = text_of(run / "report.html"), (run / "report.html").read_text()
    assert text.count("head's temporal features, layer") == 1 and "could not be shown" not in text
    videos = Predictions.load(run / "predictions" / "val-1x1.npz").video_ids or ()
    assert any(f'alt="Frames of {video}"' in html for video in videos)


def test_videos_with_several_classes_are_told_by_map(tmp_path: Path, vcache: VCache) -> None:
    def multi_hot(labels: np.ndarray) -> np.ndarray:
        hot = np.eye(K, dtype=np.uint8)[labels]
        hot[::3] |= np.roll(hot[::3], 1, axis=1)
        return hot

    with viewed_store(tmp_path / "several.zarr", columns={"multi_hot": multi_hot}) as store:
        record_facts(store, {"multi_label": True})
        manifest = store.manifest
    config = {"head": "linear", "head_config": {"num_classes": K, "width": D}, "store": str(tmp_path / "several.zarr")}
    config |= {"dataset": "toy", "store_key": manifest.key, "store_spec": manifest.spec, "train_split": "train"}
    run = Run.create(tmp_path / "run", config, manifest.class_names)
    run.save_head(LinearHead(LinearHead.Config(num_classes=K, width=D)).state_dict())
    status, _, err = vcache(f"report {run.path} --device cpu")
    assert status == 0, err
    text, metrics = text_of(run.path / "report.html"), evaluate(run.path, device="cpu").metrics
    assert f"mAP {100 * metrics.monitored:.1f}%" in text and "top-1" not in text
    assert "videos may have several classes" in text and "mean of 3x1 views" in text


def test_an_imported_head_is_reported_on_the_store_that_is_named(
    evl_run: Path, vcache: VCache, float32_store: Path
) -> None:
    for name in ("metrics.jsonl", "steps.jsonl"):
        (evl_run / name).unlink()
    nothing = dict.fromkeys(("store", "store_key", "store_spec", "recipe", "train_split", "dataset"))
    with_config(
        evl_run, **nothing, imported={"file": "evl.pth", "extract": "vcache extract DATASET", "trained_along": {}}
    )
    status, _, err = vcache(f"report {evl_run} --no-explain")
    assert status == 0, err
    assert "--store" in err and "not evaluated" in text_of(evl_run / "report.html")
    assert vcache(f"report {evl_run} --no-explain --device cpu --store {float32_store}")[0] == 0
    text = text_of(evl_run / "report.html")
    assert "of 3 classes" in text and "The head was imported" in text and "evl.pth" in text


def changed_log(run: Path, change: Callable[[int, dict[str, object]], dict[str, object]]) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(change(i, line)) + "\n" for i, line in enumerate(lines)))


def test_losses_that_are_no_numbers_are_said_and_draw_no_empty_chart(evl_run: Path, vcache: VCache) -> None:
    changed_log(evl_run, lambda i, line: line | {"train_loss": float("nan") if i > 0 else 1.5})
    assert vcache(f"report {evl_run} --device cpu --no-explain")[0] == 0
    text = text_of(evl_run / "report.html")
    assert "The loss of training after epoch 2 is no finite number." in text and "Loss, over epoch" in text
    changed_log(evl_run, lambda i, line: line | {"train_loss": float("inf"), "val_loss": float("nan")})
    assert vcache(f"report {evl_run} --device cpu --no-explain")[0] == 0
    text = text_of(evl_run / "report.html")
    assert "The loss of training after epoch 1" in text and "Loss, over epoch" not in text


def test_an_epoch_without_validation_is_passed_over(evl_run: Path, vcache: VCache) -> None:
    known = json.loads((evl_run / "metrics.jsonl").read_text().splitlines()[1])["val_top1"]
    changed_log(evl_run, lambda i, line: {k: None if i == 2 and k.startswith("val_") else v for k, v in line.items()})
    (evl_run / "head.safetensors").unlink()
    status, out, _ = vcache(f"report {evl_run}")
    assert status == 0 and f"top-1 {known:.1%} in the validation after epoch 2" in out


def cells_of(html: str, label: str) -> list[list[str]]:
    """The rows of the body of the table with this label."""
    body = re.search(rf'aria-label="{label}"[^>]*>.*?<tbody>(.*?)</tbody>', html, re.DOTALL)
    assert body is not None
    rows = re.findall(r"<tr.*?</tr>", body[1], re.DOTALL)
    return [[unescape(re.sub("<[^>]+>", "", one)) for one in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in rows]


def test_the_numbers_of_a_page_are_those_of_scikit_learn_and_of_the_logs(evl_run: Path, vcache: VCache) -> None:
    assert vcache(f"report {evl_run} --device cpu --no-explain")[0] == 0
    told = json.loads(vcache(f"eval {evl_run} --device cpu --json")[1])
    html, text = (evl_run / "report.html").read_text(), text_of(evl_run / "report.html")
    with np.load(evl_run / "predictions" / "val-1x1.npz") as there:
        targets, best, names = there["targets"], there["scores"].argmax(axis=1), there["class_names"].tolist()
    matrix = [[int(cell) for cell in row[1:]] for row in cells_of(html, "Confusion matrix")]
    assert matrix == confusion_matrix(targets, best, labels=range(len(names))).tolist()
    assert f"top-1 {accuracy_score(targets, best):.1%} [" in text and f"top-1 {told['top1']:.1%} [" in text
    assert f"mean class accuracy {balanced_accuracy_score(targets, best):.1%} [" in text
    classes = {row[0]: row[1:4] for row in cells_of(html, "Classes")}
    assert len(classes) == len(set(targets.tolist()))
    for name, (number, right, interval) in classes.items():
        of_class = targets == names.index(name)
        hits = int((best[of_class] == targets[of_class]).sum())
        low, high = binomtest(hits, int(of_class.sum())).proportion_ci(0.95, "wilson")
        assert (number, right) == (str(of_class.sum()), f"{hits / of_class.sum():.1%}")
        assert interval == f"{100 * low:.0f} to {100 * high:.0f}%"
    lines = [json.loads(line) for line in (evl_run / "metrics.jsonl").read_text().splitlines()]
    waiting, seconds = (sum(line[name] for line in lines) for name in ("waiting_seconds", "seconds"))
    values = [line["val_top1"] for line in lines]
    assert f"{waiting / seconds:.1%} of the time" in text and f"Steps {lines[-1]['step']}, " in text
    assert f"Its best top-1, {max(values):.1%}, came after epoch {values.index(max(values)) + 1}; the last is" in text
    assert f"the last is {values[-1]:.1%}." in text


EVIL = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "</script><script>x",
    "x" * 200,
    "\U0001f600 'a' &amp;",
)


def test_no_name_of_a_class_or_video_becomes_markup(evl_run: Path, vcache: VCache, tmp_path: Path) -> None:
    scores, targets = np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32), np.arange(20) % 5
    key = Run.open(evl_run).config["store_key"]
    made = Predictions(scores=scores, kind="softmax", targets=targets, class_names=EVIL, split="val", views="1x1")
    videos = tuple(f"{number} <b>'\"&" for number in range(20))
    (evl_run / "predictions").mkdir()
    replace(made, video_ids=videos, store_key=key).save(evl_run / "predictions" / "val-1x1.npz")
    (evl_run / "classes.txt").write_text("\n".join(EVIL) + "\n")
    with_config(evl_run, store=str(tmp_path / "<i>gone.zarr"))
    assert vcache(f"report {evl_run}")[0] == 0
    html = (evl_run / "report.html").read_text()
    found: list[str] = []

    class Elements(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            found.extend([tag, *(name for name, _ in attrs if name.startswith("on"))])

    Elements().feed(html)
    assert found.count("script") == 1 and not {"img", "onerror"} & set(found)
    assert "<b>'" not in html and "<i>gone" not in html
    assert {row[0] for row in cells_of(html, "Classes")} == set(EVIL)
