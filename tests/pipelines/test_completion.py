"""TAB in a shell: what is offered, and that a shell need not wait for torch."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vcache.extract.datasets.registry import list_datasets
from vcache.heads.registry import list_heads
from vcache.pipelines.head_presets import presets_of

MAIN = "from vcache.pipelines.cli import main; main()"
Complete = Callable[..., list[str]]


@pytest.fixture
def complete(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Complete:
    """complete("eval", "ru") -> what bash is told for that line, the last word being half written."""
    from vcache.pipelines.cli import main

    monkeypatch.chdir(tmp_path)

    def ask(*words: str) -> list[str]:
        line = ("vcache", *words)
        monkeypatch.setenv("COMP_WORDS", " ".join(line))
        monkeypatch.setenv("COMP_CWORD", str(len(words)))
        monkeypatch.setenv("_VCACHE_COMPLETE", "complete_bash")
        monkeypatch.setattr(sys, "argv", ["vcache"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        return capsys.readouterr().out.split()

    return ask


def test_commands_options_and_names_are_offered(complete: Complete) -> None:
    assert complete("few") == ["few-shot"]
    assert complete("sweep", "linear", "--see") == ["--seeds"]
    assert complete("train-head", "") == list(list_heads())
    registered = [name for name, info in list_datasets().items() if not info.chosen_by_path]
    assert complete("extract", "") == registered
    assert complete("extract", "ucf101-") == ["ucf101-2", "ucf101-3"]


@pytest.mark.parametrize("head", ["evl", "st-adapter", "linear"])
def test_presets_are_those_of_the_head_on_the_line(complete: Complete, head: str) -> None:
    assert complete("train-head", head, "--preset", "") == list(presets_of(head))


def test_runs_sweeps_and_stores_in_reach_are_offered(
    complete: Complete, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VCACHE_HOME", str(tmp_path / "home"))
    for name in ("runs/evl-1/config.json", "runs/sweep-1/sweep.json", "runs/sweep-1/a/config.json", "runs/notes/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name in ("here.zarr", "home/there.zarr"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "zarr.json").touch()
    assert complete("eval", "") == ["runs/evl-1", "runs/sweep-1"]
    assert complete("compare", "runs/evl-1", "runs/sweep-1/") == ["runs/sweep-1/a"]
    assert complete("info", "") == ["here.zarr", str(tmp_path / "home" / "there.zarr")]
    assert complete("train-head", "evl", "--store", "he") == ["here.zarr"]
    assert complete("eval", "nowhere/") == []  # the shell goes on with paths


def shell(code: str, **environment: str) -> str:
    """Standard output of Python in another process; `python` of its PATH is this one."""
    told = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], env=told, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("line", ["train-head evl --preset k400-b16-8f-t", "extract k4"])
def test_a_shell_does_not_wait_for_torch(line: str) -> None:
    """The slowest of all: presets are in modules of their own, datasets are found by loading theirs."""
    found = shell(
        f"import sys, atexit; sys.argv = ['vcache']\n"
        f"atexit.register(lambda: print('LOADED', [name for name in ('torch', 'zarr') if name in sys.modules]))\n{MAIN}",
        COMP_WORDS=f"vcache {line}",
        COMP_CWORD=str(len(line.split())),
        _VCACHE_COMPLETE="complete_bash",
    ).splitlines()
    assert "k400" in found[0] and found[-1] == "LOADED []"


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
def test_bash_itself_completes_with_the_script_that_is_shown(tmp_path: Path) -> None:
    program = tmp_path / "vcache"
    program.write_text(f"#!{sys.executable}\n{MAIN}\n")
    program.chmod(0o755)
    script = tmp_path / "complete.sh"
    path = f"{tmp_path}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    shown = subprocess.run([program, "--show-completion", "bash"], env=environment, capture_output=True, text=True)
    script.write_text(shown.stdout)
    typed = f"""
        source {script}
        complete -p vcache
        COMP_WORDS=(vcache train-head st); COMP_CWORD=2
        _vcache_completion vcache
        echo "offered ${{COMPREPLY[*]}}"
    """
    told = subprocess.run(["bash", "-c", typed], env=environment, capture_output=True, text=True, check=True).stdout
    assert "-F _vcache_completion vcache" in told and "offered st-adapter" in told


@pytest.mark.parametrize("name", ["zsh", "fish"])
def test_there_is_a_script_for_other_shells(name: str) -> None:
    code = f"import sys; sys.argv = ['vcache', '--show-completion', '{name}']; {MAIN}"
    shown = shell(code, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert f"_VCACHE_COMPLETE=complete_{name}" in shown
