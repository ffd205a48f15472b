"""`vcache sweep` and `few-shot`: many heads from one read of the store."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from vcache.pipelines import console
from vcache.pipelines.options import Json, takes
from vcache.pipelines.training.options import given_options
from vcache.store.object_path import store_path

if TYPE_CHECKING:  # imported late: these load torch and zarr
    from vcache.pipelines.few_shot import FewShot
    from vcache.pipelines.training.sweep import Sweep, SweepSummary
    from vcache.pipelines.training.sweep_plan import SweepPlan

_Together = Annotated[
    int | None, typer.Option(min=1, help="Heads side by side at most. Default: as many as fit in memory.")
]
_SkipInvalid = Annotated[
    bool, typer.Option("--skip-invalid", help="Train the others where some combinations are impossible.")
]
_DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the members and their groups; nothing is trained or written.")
]


@takes(given_options, own_first=True)
def sweep(
    given: dict[str, Any],
    heads: Annotated[
        str | None, typer.Argument(help="A head, or a .toml file that names several.", metavar="HEAD|FILE.toml")
    ] = None,
    grids: Annotated[
        list[str] | None,
        typer.Option(
            "--grid",
            metavar="NAME=A,B,C",
            help="Values to try, each with all of the other grids: any name that --set takes. Lists stand in brackets: "
            "layers=\\[8,9],\\[10,11]. May be repeated.",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="The same for all: any field of the head, of its recipe, or of the run (shots, fraction, patience, ...). "
            "May be repeated.",
        ),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Train each with seeds 0 to N-1. Default: 1", metavar="N")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write. Default: runs/sweep-1, -2, ...")] = None,
    together: _Together = None,
    skip_invalid: _SkipInvalid = False,
    dry_run: _DryRun = False,
    example: Annotated[bool, typer.Option("--example", help="Print a FILE.toml to start from.")] = False,
    as_json: Json = False,
) -> None:
    """Train many heads side by side: every batch is read once for all, and each becomes what it would be alone.

    Each member is a run as of `vcache train-head`; results.csv, summary.csv and results.md compare them over the seeds. A head
    that fails does not stop the others; what was stopped goes on with `vcache resume`.

    Heads share their reads where store, split, views, batch size, subset and data seed are the same; others, and those that do
    not fit into memory together, are trained in groups, one after the other.

    A FILE.toml mixes heads: `vcache sweep --example` prints one.

    \b
    [bold]Examples:[/bold]
    vcache sweep evl --grid depth=1,2,4 --grid temporal_conv=on,off --seeds 3
    vcache sweep dist --grid temporal_block=r2plus1d,c3d,tada --grid gamma=1,2
    vcache sweep linear --grid lr=1e-3,1e-2 --grid weight_decay=0,0.05 --epochs 20
    vcache sweep heads.toml --epochs 2 --dry-run
    """
    if example:
        from vcache.pipelines.training.sweep_file import EXAMPLE

        print(EXAMPLE, end="")
        return
    if heads is None:
        raise typer.BadParameter("name a HEAD or a FILE.toml: vcache sweep evl --grid depth=1,2,4")
    from vcache.pipelines.settings import parse_pairs
    from vcache.pipelines.training.sweep import Sweep
    from vcache.pipelines.training.sweep_file import read_sweep
    from vcache.pipelines.training.sweep_plan import plan_sweep
    from vcache.pipelines.training.sweep_spec import parse_grids
    from vcache.pipelines.training.torchrun import is_first_process

    members = read_sweep(heads, parse_pairs(settings or []) | _texts(given), parse_grids(grids or []), seeds)
    plan = plan_sweep(members, together=together, skip_invalid=skip_invalid)
    if dry_run:
        console.print_json(plan.to_json()) if as_json else _print_members(plan)
        return
    begun = Sweep.create(out, plan)
    if is_first_process():
        _print_groups(plan)
    train(begun, as_json=as_json)


@takes(given_options, own_first=True, without=("shots", "fraction", "data_seed"))
def few_shot(
    given: dict[str, Any],
    heads: Annotated[str, typer.Argument(help="A head, or a .toml file that names several.", metavar="HEAD|FILE.toml")],
    where: Annotated[
        str | None,
        typer.Argument(help="The store to train on. Default: the one in $VCACHE_HOME that fits.", metavar="STORE"),
    ] = None,
    shots: Annotated[
        str, typer.Option(metavar="K,K,...", help="Videos of each class to train on; `all` is the whole split.")
    ] = "1,3,5,all",
    seeds: Annotated[
        int | None,
        typer.Option(
            min=1, help="Draws 0 to N-1 of the videos, each with weights of its own. Default: 3.", metavar="N"
        ),
    ] = None,
    grids: Annotated[
        list[str] | None,
        typer.Option(
            "--grid", metavar="NAME=A,B,C", help="Variants to compare, as in `vcache sweep`. May be repeated."
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="The same for all, as in `vcache sweep`. May be repeated."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write. Default: runs/few-shot-1, -2, ...")] = None,
    together: _Together = None,
    skip_invalid: _SkipInvalid = False,
    dry_run: _DryRun = False,
    as_json: Json = False,
) -> None:
    """Train on K videos of each class, for several K and draws of the videos: a table and a curve, beside zero-shot.

    A row for each variant of --grid, a column for each K: mean and sample standard deviation over the seeds, after the last
    epoch, on the validation split. Each seed draws its own videos, and those of few shots are among those of more. Where a head
    classifies by text of the store, zero-shot stands first: CLIP without training, the mean of the frames against the mean of the
    templates.

    An epoch of few videos has few steps, and the default is the head's own recipe. Text4Vis trains 200 epochs in its paper
    (--epochs 200); its code repeats the few videos until an epoch has as many steps as one of all: --steps N takes N steps for
    every K.

    It is a sweep, whose runs stay in OUT beside few-shot.csv, few-shot.md and few-shot.png. What was stopped goes on with
    `vcache resume OUT`, and of what is complete that prints the table again.

    \b
    [bold]Examples:[/bold]
    vcache few-shot text4vis --grid temporal=t_trans,t1d --epochs 200
    vcache few-shot actionclip STORE.zarr --shots 1,2,4,8,16 --grid prompt=meanp,transf --steps 2000
    vcache few-shot heads.toml --shots 1,5,all --seeds 5
    """
    from vcache.pipelines.few_shot import FewShot
    from vcache.pipelines.few_shot_members import few_shot_members, parse_shots
    from vcache.pipelines.settings import parse_pairs
    from vcache.pipelines.training.sweep_plan import plan_sweep
    from vcache.pipelines.training.sweep_spec import parse_grids
    from vcache.pipelines.training.torchrun import is_first_process

    if where and where != given.setdefault("store", where):
        raise typer.BadParameter(f"{given['store']} is another store than {where}; name one", param_hint="--store")
    numbers = parse_shots(shots)
    said = parse_pairs(settings or []) | _texts(given)
    members = few_shot_members(heads, said, parse_grids(grids or []), numbers, seeds)
    plan = plan_sweep(members, together=together, skip_invalid=skip_invalid)
    if dry_run:
        console.print_json(plan.to_json()) if as_json else _print_members(plan)
        return
    with console.stages() as on_stage:
        on_stage("evaluating CLIP without training")
        begun = FewShot.create(out, plan, numbers)
    if is_first_process():
        _print_groups(plan)
    train(begun.sweep, as_json=as_json)


def _texts(given: dict[str, Any]) -> dict[str, str]:
    """Options as --set takes them."""
    return {name: ",".join(value) if isinstance(value, tuple) else str(value) for name, value in given.items()}


def resume_sweep(path: Path, *, store: str | None, device: str | None, as_json: bool) -> None:
    """`vcache resume` of a sweep: its unfinished members go on; those that failed are left."""
    from vcache.pipelines.training.sweep import Sweep

    train(Sweep.open(path).moved(store_path(store) if store else None, device), resume=True, as_json=as_json)


def train(sweep: "Sweep", *, as_json: bool, resume: bool = False) -> None:
    """Train what is left, with a screen; exit status 1 if a member failed. Of a few-shot sweep, its table and curve too."""
    from vcache.pipelines.few_shot import FewShot
    from vcache.pipelines.training.group import TrainingEvents
    from vcache.pipelines.training.screen import training_bar
    from vcache.pipelines.training.sweep import run_sweep
    from vcache.pipelines.training.torchrun import is_first_process

    over_shots = FewShot.of(sweep) if is_first_process() else None
    try:
        with training_bar("sweep", epoch_lines=False) as screen:
            summary = run_sweep(sweep, TrainingEvents(**screen.callbacks), resume=resume)
    finally:
        if over_shots:
            over_shots.write()
    if over_shots:
        console.print_json(over_shots.to_json(summary)) if as_json else _print_few_shot(over_shots, summary)
    else:
        console.print_json(summary.to_json()) if as_json else _print_summary(summary)
    if summary.num_failed:
        raise typer.Exit(1)


def _print_members(plan: "SweepPlan") -> None:
    for member in plan.members:
        console.out.print(f"{member.name}  [dim]{member.folder}[/dim]", soft_wrap=True, highlight=False)
    _print_groups(plan, console.out)


def _print_groups(plan: "SweepPlan", where: Console = console.err) -> None:
    for line in plan.lines:
        console.print_sentence(where, line)
    for name, reason in plan.skipped:
        where.print(f"[red]skipped[/red]  {escape(f'{name}: {reason}')}", soft_wrap=True, highlight=False)


def _print_summary(summary: "SweepSummary") -> None:
    from vcache.pipelines.training.sweep_results import best_setting, results_table, summarise

    console.out.print(results_table(summary.results))
    best = best_setting(summarise(summary.results))
    if best is not None:
        console.out.print("* the best mean", highlight=False)
    _print_failures(summary)
    console.out.print(f"[bold]{escape(str(summary.sweep))}[/bold]", soft_wrap=True)
    names = ", ".join(path.name for path in summary.files)
    console.out.print(f"  {names}; a run folder for each member", soft_wrap=True, highlight=False)


def _print_few_shot(over_shots: "FewShot", summary: "SweepSummary") -> None:
    from vcache.pipelines.few_shot import FILES
    from vcache.pipelines.few_shot_results import few_shot_screen

    console.out.print(few_shot_screen(over_shots.table()))
    _print_failures(summary)
    console.out.print(f"[bold]{escape(str(summary.sweep))}[/bold]", soft_wrap=True)
    console.out.print(f"  {', '.join(FILES)}; a run folder for each member", soft_wrap=True, highlight=False)


def _print_failures(summary: "SweepSummary") -> None:
    from vcache.pipelines.training.sweep_results import failure_lines

    for line in failure_lines(summary.results):
        console.out.print(f"[red]{escape(line)}[/red]", soft_wrap=True, highlight=False)
    for name, reason in summary.skipped:
        console.out.print(f"[red]skipped[/red]  {escape(f'{name}: {reason}')}", soft_wrap=True, highlight=False)
