"""What a person sees of a training: on a terminal of 80 columns, and in a file."""

import io
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from vcache.heads.requirements import Recipe
from vcache.pipelines import console
from vcache.pipelines.training import screen_lines
from vcache.pipelines.training.logs import read_log
from vcache.pipelines.training.reports import EpochReport, HeadProgress, StepReport, TrainingPlan, TrainingSummary
from vcache.pipelines.training.screen import LINES_BELOW_TABLE, QUIET_SECONDS, print_training_summary, training_bar

Head = Callable[..., HeadProgress]
Report = Callable[..., StepReport]
Epoch = Callable[..., EpochReport]
Plan = Callable[..., TrainingPlan]


class Terminal:
    """The lines that a terminal would show: text, line breaks, and rich's ways to go up and to erase."""

    def __init__(self, width: int = 80, height: int = 25, *, terminal: bool = True) -> None:
        self.console = Console(
            file=io.StringIO(), width=width, height=height, force_terminal=terminal, force_interactive=terminal
        )

    @property
    def written(self) -> str:
        return self.console.file.getvalue()  # type: ignore[attr-defined]

    def lines(self) -> list[str]:
        shown, row, column = [""], 0, 0
        for code, end, text in re.findall(r"\x1b\[([0-9;?]*)([A-Za-z])|([^\x1b])", self.written):
            if text == "\n":
                row, column = row + 1, 0
                shown += [""] * (row == len(shown))
            elif text == "\r":
                column = 0
            elif text:
                shown[row] = shown[row][:column].ljust(column) + text + shown[row][column + 1 :]
                column += 1
            elif end == "A":
                row -= int(code or 1)
            elif end == "K":
                shown[row] = ""
        # The time that the test took is not what it is about.
        return [re.sub(r"(epoch \d+/\d+  )\d+:\d\d", r"\g<1>0:00", line).rstrip() for line in shown]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Terminal]:
    def make(**options: object) -> Terminal:
        made = Terminal(**options)  # type: ignore[arg-type]
        monkeypatch.setattr(console, "err", made.console)
        monkeypatch.setenv("TERM", "xterm")
        return made

    return make


def test_one_head_has_a_bar_and_says_how_well_how_fast_and_what_limits(
    terminal: Callable[..., Terminal], make_plan: Plan, make_head: Head, make_report: Report
) -> None:
    bar = "evl-1 ━━━━━╸━━━━━━━━━━━━━━━━━━ 120/500 steps  epoch 5/20  0:00  ETA 11 s"
    facts = "  loss 1.234, train top-1 45.6%, val 50.0% (best 52.5%), lr 0.0015"
    speed = "35.2 steps/s, 120 MB/s from disk, limited by reading 73%"
    for width, drawing in ((80, [bar, facts, f"  {speed}"]), (130, [bar, f"{facts}, {speed}"])):
        seen = terminal(width=width)
        with training_bar("evl") as screen:
            screen.plan(
                make_plan(
                    residency="read from disk: 1 GB is more than the free RAM",
                    shuffle="shards",
                    shuffle_bytes=1_200_000_000,
                    subset="40 of 400 videos are trained on, 4 of each class",
                )
            )
            assert seen.lines()[-2:] == ["evl ━━━━━━━━━━━━━━━━━━━━━━━━ 0/500 steps", "  waiting for the first batch"]
            screen.step(make_report(make_head()))
        plan, drawn = seen.lines()[: -len(drawing) - 1], seen.lines()[-len(drawing) - 1 :]
        assert drawn == [*drawing, ""]
        assert " ".join(" ".join(plan).split()) == (
            "k400.zarr: 400 videos to train on, 200 to validate on; 1,032,330 parameters, 500 steps of 16 (20 epochs), "
            "AdamW lr 0.002, weight decay 0.05, cosine 40 of 400 videos are trained on, 4 of each class "
            "read from disk: 1 GB is more than the free RAM "
            "Epochs are shuffled shard by shard, in a buffer of about 1.2 GB of memory"
        )
        starts = ("  40 of", "  read from", "  Epochs are")
        assert sum(line.startswith(starts) for line in plan) == 3, "each fact begins a line"
        assert all(len(line) <= width for line in plan)


@pytest.mark.parametrize(
    ("length", "words"),
    [
        ({"epochs": 6, "warmup_epochs": 6.0}, "  The warm-up takes 6 epochs, and the training 6 epochs; a shorter one:  "
         "--set warmup_epochs=N"),
        ({"steps": 7, "warmup_steps": 9}, "  The warm-up takes 9 steps, and the training 7 steps; a shorter one:  "
         "--set warmup_steps=N"),
        ({"epochs": 7, "warmup_epochs": 6.0}, ""),
        ({"steps": 9, "warmup_steps": 8}, ""),
    ],
)  # fmt: skip
def test_a_warm_up_that_never_ends_is_said(length: dict[str, float], words: str, make_plan: Plan) -> None:
    recipe = Recipe(lr=1.0, weight_decay=0.0, batch_size=3, **{"epochs": None, **length})  # type: ignore[arg-type]
    plan = make_plan(recipe=recipe, **{key: value for key, value in length.items() if "warmup" not in key})
    assert list(screen_lines.plan_lines(plan))[1:] == ([words] if words else [])


def test_one_parameter_is_no_plural(make_plan: Plan) -> None:
    assert "; 1 parameter, " in next(screen_lines.plan_lines(make_plan(num_parameters=1)))
    assert "; 2 parameters, " in next(screen_lines.plan_lines(make_plan(num_parameters=2)))


def test_what_limits_may_be_computing_or_not_known_yet(make_head: Head, make_report: Report) -> None:
    computing = make_report(make_head(), waiting=0.03, limited_by="computing", source="RAM", read_bytes_per_second=0.0)
    assert screen_lines.speed_facts(computing) == ["35.2 steps/s", "from RAM", "limited by computing 97%"]
    unknown = make_report(make_head(), limited_by=None, steps_per_second=1234.5)
    assert screen_lines.speed_facts(unknown) == ["1,234 steps/s", "120 MB/s from disk"]


def test_an_early_error_has_no_empty_bar_above_it(terminal: Callable[..., Terminal], make_plan: Plan) -> None:
    seen = terminal()
    with pytest.raises(RuntimeError), training_bar("evl"):
        raise RuntimeError("no such store")
    assert seen.written == ""
    with pytest.raises(RuntimeError), training_bar("evl") as screen:
        screen.plan(make_plan())
        raise RuntimeError("the first batch cannot be read")
    seen.console.print("error: the first batch cannot be read")
    assert [line.split(":")[0] for line in seen.lines() if line[:1].strip()] == ["k400.zarr", "error"]
    assert "━" not in "".join(seen.lines())


def test_an_interrupted_training_leaves_its_last_drawing_and_a_cursor(
    terminal: Callable[..., Terminal], make_plan: Plan, make_head: Head, make_report: Report
) -> None:
    seen = terminal(width=150)
    with pytest.raises(KeyboardInterrupt), training_bar("evl") as screen:
        screen.plan(make_plan())
        screen.step(make_report(make_head(step=7, epoch=0)))
        raise KeyboardInterrupt
    assert seen.lines()[1].startswith("evl-1 ━")
    assert " 7/500 steps  epoch 1/20" in seen.lines()[1]
    assert seen.written.rfind("\x1b[?25h") > seen.written.rfind("\x1b[?25l")
    before = seen.written
    seen.console.print("stopped")
    assert seen.written == f"{before}stopped\n", "nothing is drawn any more"


def test_the_last_drawing_knows_of_the_steps_after_the_last_report(
    terminal: Callable[..., Terminal], make_plan: Plan, make_head: Head, make_report: Report, make_epoch: Epoch
) -> None:
    """Reports come a few times a second, epochs when they end."""
    seen = terminal(width=150)
    with training_bar("evl") as screen:
        screen.plan(make_plan())
        screen.step(make_report(make_head(step=470)))
        screen.epoch(make_epoch(epoch=19, step=500, best=True, val_top1=0.551))
    _, epoch, bar, facts, *_ = seen.lines()
    assert epoch == "epoch  20  loss 1.200  46.0%  val 1.300  top-1  55.1%  top-5  90.0%  12 s  best"
    assert bar == "evl-1 ━━━━━━━━━━━━━━━━━━━━━━━━ 500/500 steps  epoch 20/20  0:00"
    assert facts.startswith("  loss 1.200, train top-1 46.0%, val 55.1% (best 55.1%), lr 0.0014, ")


def test_an_epoch_fits_into_80_columns_whatever_it_measures(make_epoch: Epoch) -> None:
    perfect = make_epoch(train_top1=1.0, val_top1=1.0, val_top5=1.0, train_loss=9.876, best=True)
    assert len(screen_lines.epoch_line(perfect)) <= 80
    several = make_epoch(val_top1=None, val_top5=None, val_mean_average_precision=0.615)
    assert screen_lines.epoch_line(several) == "epoch   5  loss 1.200  46.0%  val 1.300  mAP  61.5%  12 s"
    assert several.monitored == 0.615
    alone = make_epoch(val_loss=None, val_top1=None, val_top5=None)
    assert screen_lines.epoch_line(alone) == "epoch   5  loss 1.200  46.0%  12 s"


def test_several_heads_are_a_table_and_those_that_end_are_told(
    terminal: Callable[..., Terminal], make_plan: Plan, make_head: Head, make_report: Report, make_epoch: Epoch
) -> None:
    seen = terminal()
    heads = [
        make_head(name="evl-depth=4-s0", best=0.625),
        make_head(
            name="linear-s0", state="failed", note="the loss is nan, with [any] rate", step=12, val=None, best=None
        ),
        make_head(name="linear-s1", state="stopped early", step=75, loss=None, train_top1=None),
        make_head(name="linear-s2", state="finished", step=500),
    ]
    with training_bar("sweep") as screen:
        screen.plan(make_plan(num_heads=4, group="group 1 of 2", resumed_from="step 100 of 500"))
        for _ in range(3):
            screen.step(make_report(*heads))
        screen.epoch(make_epoch(head="evl-depth=4-s0"))
    assert seen.lines() == [
        "k400.zarr: 400 videos to train on, 200 to validate on; 4 heads with 1,032,330",
        "  parameters, 500 steps of 16 (20 epochs)",
        "  group 1 of 2; resumed after step 100 of 500",
        "linear-s0 failed after 12 steps: the loss is nan, with [any] rate",
        "linear-s1 stopped early after 75 steps",
        "head                    step   loss  train    val   best",
        "evl-depth=4-s0       125/500  1.200  46.0%  51.0%  62.5%",
        "linear-s0          failed 12  1.234  45.6%      -      -",
        "linear-s1         stopped 75      -      -  50.0%  52.5%",
        "linear-s2       finished 500  1.234  45.6%  50.0%  52.5%",
        "group 1 of 2 ━━━━━━╺━━━━━━━━━━━━━━━━━ 125/500 steps  epoch 5/20  0:00  ETA 11 s",
        "  1 training, 1 failed, 1 stopped early, 1 finished, best evl-depth=4-s0 62.5%",
        "  35.2 steps/s, 120 MB/s from disk, limited by reading 73%",
        "",
    ]


def test_heads_whose_last_epoch_is_done_are_finished_in_the_last_drawing(
    terminal: Callable[..., Terminal], make_plan: Plan, make_head: Head, make_report: Report, make_epoch: Epoch
) -> None:
    seen, names = terminal(), ("evl-1", "evl-2")
    with training_bar("sweep") as screen:
        screen.plan(make_plan(num_heads=2))
        screen.step(make_report(*(make_head(name=name, step=470) for name in names)))
        for name in names:
            screen.epoch(make_epoch(head=name, epoch=19, step=500))
    assert "  2 finished, best evl-1 52.5%" in seen.lines()


def test_reading_into_memory_is_drawn_if_it_takes_a_while_and_leaves_nothing(
    terminal: Callable[..., Terminal], make_plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = terminal()
    with training_bar("evl") as screen:
        screen.load(0, 3_400_000_000)
        screen.load(1_200_000_000, 3_400_000_000)
        assert seen.written == ""
        monkeypatch.setattr(screen, "_began", time.monotonic() - QUIET_SECONDS)
        screen.load(1_200_000_000, 3_400_000_000)
        assert seen.lines() == ["reading features into memory: 1.2 GB of 3.4 GB"]
        screen.plan(make_plan())
        assert "reading" not in "".join(seen.lines())
    seen = terminal(terminal=False)
    monkeypatch.setattr(console, "LOG_SECONDS", 0)
    with training_bar("evl") as screen:
        screen.load(2_100_000_000, 3_400_000_000)
    assert seen.lines() == ["reading features into memory: 2.1 GB of 3.4 GB", ""]


def test_each_group_of_a_sweep_has_a_drawing_of_its_own(
    terminal: Callable[..., Terminal], make_plan: Plan, make_head: Head, make_report: Report
) -> None:
    seen = terminal()
    with training_bar("sweep") as screen:
        for number, name in enumerate(("evl", "linear"), start=1):
            screen.plan(make_plan(group=f"group {number} of 2"))
            screen.step(make_report(make_head(name=name)))
    starts = [line.split()[0] for line in seen.lines() if "/500 steps" in line]
    assert starts == ["evl", "linear"]


@settings(deadline=None)
@given(data=st.data(), room=st.integers(3, 9))
def test_of_many_heads_the_best_the_worst_and_the_last_changed_are_shown(
    make_head: Head, data: st.DataObject, room: int
) -> None:
    values = data.draw(st.lists(st.integers(0, 99), min_size=1, max_size=30, unique=True))
    heads = [make_head(name=f"head-{i}", best=value / 100) for i, value in enumerate(values)]
    last = data.draw(st.integers(0, len(heads) - 1))
    rows = screen_lines.chosen_rows(heads, {"head-0": 1.0, f"head-{last}": 2.0}, room)
    assert len(rows) == min(room, len(heads))
    assert rows == sorted(set(rows)), "in the order of the sweep"
    assert {values.index(max(values)), values.index(min(values)), last} <= set(rows)


maybe = st.none() | st.floats(0, 1)


@settings(deadline=None)
@given(
    data=st.data(),
    width=st.integers(60, 130),
    height=st.integers(12, 40),
    num_heads=st.integers(1, 30),
)
def test_whatever_is_reported_fits_the_screen(
    make_plan: Plan, make_head: Head, make_report: Report, data: st.DataObject, width: int, height: int, num_heads: int
) -> None:
    heads = [
        make_head(
            name=data.draw(
                st.sampled_from(["evl", "linear[red]", "evl-depth=4,temporal_conv=on,layers=-4:-s2", "動画-1"])
            )
            + f"-{i}",
            loss=data.draw(maybe),
            train_top1=data.draw(maybe),
            val=data.draw(maybe),
            best=data.draw(maybe),
            state=data.draw(st.sampled_from(["training", "finished", "stopped early", "failed"])),
        )
        for i in range(num_heads)
    ]
    report = make_report(*heads, seconds_left=data.draw(st.none() | st.floats(0, 1e6)))
    screen = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, force_interactive=True)
    with pytest.MonkeyPatch.context() as patch, training_bar("evl") as drawn:
        patch.setattr(console, "err", screen)
        drawn._plan, drawn._report = make_plan(num_heads=num_heads), report
        lines = screen.render_lines(drawn._drawn(), pad=False)
        drawn._report = None
    assert len(lines) < height
    for line in lines:
        assert sum(segment.cell_length for segment in line) <= width
    text = "\n".join("".join(segment.text for segment in line) for line in lines)
    assert "35.2 steps/s, 120 MB/s from disk" in text
    hidden = re.findall(r"  (\d+) more, between", text)
    room = height - LINES_BELOW_TABLE
    assert hidden == ([str(num_heads - room)] if num_heads > room else [])


def test_a_file_gets_a_line_per_epoch_and_head_and_one_a_minute(
    terminal: Callable[..., Terminal],
    make_plan: Plan,
    make_head: Head,
    make_report: Report,
    make_epoch: Epoch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = terminal(terminal=False)
    with training_bar("evl") as screen:
        screen.plan(make_plan())
        for step in range(1, 6):
            screen.step(make_report(make_head(step=step)))
        screen.epoch(make_epoch(epoch=19, step=500))
    assert [line.split(",")[0] for line in seen.lines()[1:]] == [
        "epoch  20  loss 1.200  46.0%  val 1.300  top-1  51.0%  top-5  90.0%  12 s",
        "evl-1: 500/500 steps",
        "",
    ]
    monkeypatch.setattr(console, "LOG_SECONDS", 0)
    seen, heads = terminal(terminal=False), [make_head(name=f"evl-{i}", best=i / 10) for i in range(3)]
    with training_bar("sweep") as screen:
        screen.plan(make_plan(num_heads=3))
        screen.step(make_report(*heads))
        screen.epoch(make_epoch(head="evl-1"))
    assert seen.lines()[1:] == [
        "3 heads: 120/500 steps, epoch 5/20, 3 training, best evl-2 20.0%, 35.2 steps/s, 120 MB/s from disk, "
        "limited by reading 73%, 11 s left",
        "evl-1: epoch   5  loss 1.200  46.0%  val 1.300  top-1  51.0%  top-5  90.0%  12 s",
        "",
    ]
    assert "\x1b" not in seen.written


def test_a_step_costs_less_than_50_microseconds_while_nothing_is_drawn(
    terminal: Callable[..., Terminal], make_plan: Plan, make_head: Head, make_report: Report
) -> None:
    report = make_report(*(make_head(name=f"evl-{i}") for i in range(24)))
    for is_terminal in (True, False):
        terminal(terminal=is_terminal)
        with training_bar("sweep") as screen:
            screen.plan(make_plan(num_heads=24))
            rounds = []
            for _ in range(20):
                began = time.perf_counter()
                for _ in range(100):
                    screen.step(report)
                rounds.append((time.perf_counter() - began) / 100)
        assert min(rounds) < 50e-6


def test_the_end_says_where_the_run_is_how_good_and_how_to_go_on(
    make_epoch: Epoch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(**fields: object) -> list[str]:
        defaults: dict[str, object] = {
            "run": "runs/evl 1",
            "store": "k400.zarr",
            "num_train": 400,
            "num_val": 200,
            "num_failed": 0,
            "num_parameters": 7,
            "epochs": 20,
            "steps": 500,
            "last": make_epoch(),
            "best_epoch": 4,
            "best_value": 0.51,
            "stopped_early": False,
            "stopped": False,
        }
        seen = Console(file=io.StringIO(), width=80)
        monkeypatch.setattr(console, "out", seen)
        print_training_summary(TrainingSummary(**{**defaults, **fields}))  # type: ignore[arg-type]
        return seen.file.getvalue().splitlines()  # type: ignore[attr-defined]

    assert said() == [
        "runs/evl 1",
        "  top-1 51.0% of 200 validation videos",
        "  evaluate with:  vcache eval 'runs/evl 1'",
    ]
    assert said(best_epoch=2, best_value=0.533, stopped_early=True)[1:3] == [
        "  top-1 51.0% of 200 validation videos; the best was 53.3% after epoch 3",
        "  stopped early, after 5 epochs of 20",
    ]
    assert said(last=None, best_epoch=None, best_value=None, stopped=True) == [
        "runs/evl 1",
        "  stopped; go on with:  vcache resume 'runs/evl 1'",
    ]


def test_a_training_writes_its_logs_into_the_run_folder(
    vcache: Callable[..., tuple[int, str, str]], float32_store: Path, tmp_path: Path
) -> None:
    line = f"train-head linear --store {float32_store} --epochs 2 --batch-size 5 --out {tmp_path / 'run'}"
    status, out, err = vcache(line)
    assert status == 0
    assert "evaluate with:  vcache eval" in out
    assert "are kept in memory" in err.splitlines()[1]
    assert [text.split("  ")[0] for text in err.splitlines()[2:4]] == ["epoch", "epoch"]
    assert err.splitlines()[-1].startswith("run: 6/6 steps, epoch 2/2, loss ")
    assert [line["step"] for line in read_log(tmp_path / "run" / "steps.jsonl")] == [1, 2, 3, 4, 5, 6]
    metrics = read_log(tmp_path / "run" / "metrics.jsonl")
    assert [(line["head"], line["epoch"]) for line in metrics] == [("run", 0), ("run", 1)]
    assert metrics[0]["best"] is True
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1
