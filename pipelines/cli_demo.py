"""`vcache demo`: the whole way on a small world, and EVL's ablation there."""

from pathlib import Path
from typing import Annotated

import typer

from vcache.pipelines import console
from vcache.pipelines.options import Json


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the videos, the store and the runs.")] = Path("vcache-demo"),
    seed: Annotated[int, typer.Option(help="Seed of the heads.")] = 0,
    tca_gain: Annotated[
        float,
        typer.Option(
            help="Also train EVL with its cross-frame attention term times this (ours; the paper's is 1). With --ablation: "
            "in every row that has it."
        ),
    ] = 1.0,
    ablation: Annotated[
        bool,
        typer.Option(
            "--ablation",
            help="Train EVL's Table 8 in place of three heads: each choice of temporal modules, each depth, over several seeds.",
        ),
    ] = False,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="For --ablation: seeds 0 to N-1. Default: 3", metavar="N")
    ] = None,
    as_json: Json = False,
) -> None:
    """Render a small world of moving shapes, extract it with a tiny CLIP, train three heads: everything, offline, in minutes.

    With --ablation, EVL's Table 8 from the same store, beside the paper's numbers. The runs of a seed are trained side
    by side, as by `vcache sweep`. The command goes on after a stop, and trains only what more seeds add.

    [bold]Examples:[/bold]  vcache demo  |  vcache demo --ablation --seeds 3
    """
    if ablation:
        if seed:
            raise typer.BadParameter("--ablation takes --seeds N, for seeds 0 to N-1, in place of --seed")
        _ablation(out, seeds or 3, tca_gain, as_json)
        return
    if seeds is not None:
        raise typer.BadParameter("--seeds goes with --ablation; the seed of one demo is --seed")
    from vcache.pipelines.demo.run import print_demo, run_demo

    result = run_demo(out, seed=seed, tca_gain=tca_gain, show=not as_json)
    console.print_json(result) if as_json else print_demo(result)


def _ablation(out: Path, seeds: int, tca_gain: float, as_json: bool) -> None:
    from vcache.pipelines.demo.ablation import run_ablation
    from vcache.pipelines.demo.ablation_screen import print_ablation
    from vcache.pipelines.training.stopping import TrainingStopped

    try:
        result = run_ablation(out, seeds=seeds, tca_gain=tca_gain, show=not as_json)
    except (KeyboardInterrupt, TrainingStopped) as stopped:
        console.err.print("stopped; what is done is kept, and the same command goes on from there")
        raise typer.Exit(getattr(stopped, "exit_status", 130)) from None
    console.print_json(result) if as_json else print_ablation(result)
    if failed := result["failed"]:
        console.fail(f"{console.count(len(failed), 'run')} failed, see above.")
