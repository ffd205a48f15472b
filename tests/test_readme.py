"""The tree of docs/code.md is the disk's tree. Commands, links and Python on the pages: tests/docs/."""

from pathlib import Path

REPO = Path(__file__).parents[1]
TREE = (REPO / "docs" / "code.md").read_text().split("## The tree")[1].split("```")[1]


def listed_paths() -> set[str]:
    """Paths of the fenced block under "The tree": folders end in a slash, files are indented below theirs."""
    folder, paths = "", set()
    for line in TREE.strip("\n").splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
            paths.add(name)
        else:
            paths.add(folder + name)
    return paths


def test_every_path_of_the_tree_is_on_the_disk() -> None:
    missing = {path for path in listed_paths() if not (REPO / path).exists()}
    assert not missing


def test_every_module_is_in_the_tree_with_a_phrase() -> None:
    folders = ("extract", "store", "heads", "pipelines")
    modules = {str(path.relative_to(REPO)) for folder in folders for path in (REPO / folder).rglob("*.py")}
    modules |= {str(path.relative_to(REPO)) for path in (REPO / "benchmarks").glob("*.py")}
    assert {module for module in modules if not module.endswith("__init__.py")} - listed_paths() == set()
    assert all(len(line.split()) >= 3 for line in TREE.strip("\n").splitlines())
