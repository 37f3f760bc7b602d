"""Scripts in processes that need not import torch and transformers, which takes seconds: a server has them imported and
forks for every run. The script is still `__main__` in a process of its own, with its own arguments, environment, streams and
exit. What it shares with the others is the interpreter's start: the hash seed, and variables that are read at the start
(PYTHON...). So each script and each tool is started as a user does, too: run(..., fresh=True)."""
import atexit
import functools
import importlib
import multiprocessing
import os
import runpy
import sys
import threading
import traceback
from multiprocessing import connection, forkserver
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
FORKS, LOCK = multiprocessing.get_context("forkserver"), threading.Lock()
FORKS.set_forkserver_preload(
    ["pytest", "PIL.Image", "tqdm", "torchvision", "torch.nn.attention.varlen", "transformers.generation.utils"] +
    [f"transformers.models.{name}" for name in (
        "auto.modeling_auto", "auto.tokenization_auto", "auto.processing_auto", "auto.image_processing_auto",
        "llama.modeling_llama", "llava.modeling_llava", "llava.processing_llava", "clip.modeling_clip",
        "clip.image_processing_clip")])


def run_script(script, arguments, env, streams, first, start_method):
    """In the forked process: what `python script arguments` does, or `python -m data.NAME arguments`."""
    os.setpgid(0, 0)
    os.chdir(ROOT)
    multiprocessing.set_start_method(start_method, force=True)  # a fork's own workers would come from a new server
    for number, path in enumerate(streams, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), number)
    os.environ.update(env)
    sys.argv, status = [script, *arguments], 0
    try:
        for name in first:
            importlib.import_module(name)
        if script.startswith("data."):
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str((ROOT / script).parent))
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as e:
        status = e.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # as the interpreter does at its end: joins threads, and calls what is registered for the end
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@functools.cache
def start_server():
    with mock.patch.dict(os.environ, ENVIRONMENT):  # torch counts its threads when it is imported
        forkserver.ensure_running()


def start(script, arguments, streams, env={}, first=()):
    """A script, or data.NAME, at work; its stdout and stderr go to the files `streams`. `first`: modules imported before it."""
    process = FORKS.Process(target=run_script, args=(str(script), [*map(str, arguments)], env, streams, first, multiprocessing.get_start_method()))
    with LOCK:
        start_server()
        process.start()
    return process


def start_ranks(ranks, script, arguments, folder, env={}):
    """The script on so many ranks, with what torchrun tells them: they meet in a store of this process, as in one of torchrun's.
    -> their processes, and the store, which lives as long as it is held"""
    from torch.distributed import TCPStore
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # 0: any free port
    about = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port,
             "TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
    return [start(script, arguments, [folder / f"{rank}.stdout", folder / f"{rank}.stderr"],
                  {**env, **{name: str(value) for name, value in about.items()}, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(ranks)], store


def wait(process, seconds=None):
    """-> the exit status, or None: it is still at work. For several threads, too: multiprocessing looks after the processes of
    one thread when another one starts a process, and the status can be read only once."""
    connection.wait([process.sentinel], seconds)
    with LOCK:
        process.join(0)
    return process.exitcode


def wait_for_all(processes):
    """-> 0, or the exit status of the first one that fails, without waiting for the others"""
    running = {process.sentinel: process for process in processes}
    while running:
        for sentinel in connection.wait(running):
            if status := wait(running.pop(sentinel)):
                return status
    return 0
