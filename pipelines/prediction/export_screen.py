"""What `vcache export` prints, or its JSON."""

import shlex
from typing import Any

from rich.markup import escape

from vcache.pipelines import console
from vcache.pipelines.prediction.export import Exported


def described(exported: Exported) -> dict[str, Any]:
    """For a program to read."""
    programs = {name: checked.to_dict() for name, checked in exported.programs.items()}
    return {**vars(exported), "folder": str(exported.folder), "programs": programs, "notes": list(exported.notes)}


def print_exported(exported: Exported) -> None:
    """The folder, what is in it, how far programs are from the model, and the next command."""
    for note in exported.notes:
        console.err.print(f"note: {note}", soft_wrap=True, markup=False, highlight=False)
    console.out.print(f"[bold]{escape(str(exported.folder))}[/bold]", soft_wrap=True, highlight=False)
    classes = "1 class" if exported.num_classes == 1 else f"{exported.num_classes} classes"
    lines = [f"  {exported.head} on {exported.backbone}, {classes}, {console.size(exported.num_bytes)}"]
    for name, checked in exported.programs.items():
        lines.append(
            f"  {name}: logits within {checked.max_difference:.1e} of the model's "
            f"({console.count(checked.num_clips, 'clip')} of noise; {checked.tolerance:.1e} is allowed)"
        )
    lines.append(f"  Predict with:  {shlex.join(['vcache', 'predict', str(exported.folder), 'VIDEO'])}")
    for line in lines:
        console.print_sentence(console.out, line)
