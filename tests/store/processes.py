"""Writers and readers as processes of their own, forked from one that has imported everything and has no threads.

with Processes() as processes:
    writer = processes.start("run", path)
    processes.wait(writer)  # 0, or -9 if it was killed
"""

import os
import random
import resource
import subprocess
import sys
import time
import traceback
from contextlib import ExitStack
from pathlib import Path

from vcache.store.manifest import VideoTable

NUM_ROWS, NUM_MORE, ROWS_PER_SHARD = 25, 9, 2  # of what `write_every_fourth` makes: 13 and 5 shards


class Processes:
    """Starts the functions of MODES; each in a process that can be killed."""

    def __enter__(self) -> "Processes":
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        return self

    def __exit__(self, *error: object) -> None:
        self._server.stdin.close()
        self._server.stdout.close()
        self._server.wait()

    def start(self, mode: str, path: Path, argument: int = 0) -> int:
        return self._ask(f"{mode}\t{path}\t{argument}")

    def wait(self, pid: int) -> int:
        return self._ask(f"wait\t-\t{pid}")

    def _ask(self, line: str) -> int:
        self._server.stdin.write(line + "\n")
        return int(self._server.stdout.readline())


def run(path: Path, argument: int) -> None:
    """Every stage of the scenario."""
    scenario.run(World(), path)


def run_with_limit(path: Path, max_bytes: int) -> None:
    """The same where no file may grow beyond `max_bytes`: the kernel fails the write with EFBIG."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, resource.RLIM_INFINITY))
    try:
        scenario.run(World(), path)
    except OSError as error:
        os._exit(error.errno or 1)


def slow_run(path: Path, argument: int) -> None:
    """The same, slow enough for readers to see every step."""
    fsync = os.fsync
    os.fsync = lambda fd: (time.sleep(0.002), fsync(fd))[1]
    scenario.run(World(), path)


def write_shuffled(path: Path, seed: int) -> None:
    """Every shard twice, in an order that depends on the seed; another writer may have done it, or be doing it."""
    world, rng = World(), random.Random(seed)
    with FeatureStore.open(path) as store:
        tasks = [("train", shard) for shard in range(store.num_shards("train"))] * 2
        for split, shard in rng.sample(tasks, k=len(tasks)):
            try:
                scenario.write_shard(world, store, split, shard, scenario.ALL)
            except StoreExists:
                continue


def write_every_fourth(path: Path, number: int) -> None:
    """One of four that make a store together: whoever comes first makes it, each writes every fourth shard."""
    world = World()
    with ExitStack() as stack:
        with set_up_turn(path):
            if not path.exists():
                world.create(path, NUM_ROWS, ROWS_PER_SHARD).close()
            stack.enter_context(shared_writer(path))
            store = stack.enter_context(FeatureStore.open(path))
            clean_temporary(store)
            if "train+1" not in store.manifest.splits:
                add_videos(store, "train", more_videos(world))
            for part in store.parts("train"):
                declare_arrays(store, part, scenario.ALL)
        tasks = [(part, shard) for part in store.parts("train") for shard in range(store.num_shards(part))]
        for part, shard in tasks[number::4]:
            clean_temporary(store)  # nobody has to, and it must not hurt
            if not store.committed_arrays(part, shard):
                scenario.write_shard(world, store, part, shard, scenario.ALL)


def more_videos(world: "World") -> VideoTable:
    table, few = world.videos(NUM_ROWS + NUM_MORE), slice(NUM_ROWS, None)
    return VideoTable(table.ids[few], table.paths[few], table.labels[few])


def read_on(path: Path, argument: int) -> None:
    """Look again and again, until there is a file `stop` beside the store; write how many states were seen into `seen`."""
    world, found, states = World(), set(), 0
    while True:
        stop = path.with_name("stop").exists()
        now = scenario.check_old_or_complete(world, path, found)
        states += now != found
        found = now
        if stop:
            path.with_name("seen").write_text(str(states))
            return


def refresh_on(path: Path, argument: int) -> None:
    """One opened store, refreshed again and again: what is committed stays readable and right."""
    world, found, states = World(), set(), 0
    with FeatureStore.open(path) as store:
        while True:
            stop = path.with_name("stop").exists()
            store.refresh()
            now = scenario.committed(world, store)
            assert found <= now
            states += now != found
            found = now
            if stop:
                path.with_name("seen").write_text(str(states))
                return


MODES = {
    function.__name__: function
    for function in (run, run_with_limit, slow_run, write_shuffled, write_every_fourth, read_on, refresh_on)
}


def serve() -> None:
    for line in sys.stdin:
        mode, path, argument = line.rstrip("\n").split("\t")
        if mode == "wait":
            answer = os.waitstatus_to_exitcode(os.waitpid(int(argument), 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                _be(mode, Path(path), int(argument))
        print(answer, flush=True)


def _be(mode: str, path: Path, argument: int) -> None:
    try:
        MODES[mode](path, argument)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    import scenario
    from conftest import World

    from vcache.store.errors import StoreExists
    from vcache.store.locks import set_up_turn, shared_writer
    from vcache.store.reader import FeatureStore
    from vcache.store.writer import add_videos, clean_temporary, declare_arrays

    serve()
