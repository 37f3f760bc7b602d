"""What the tests rely on: a script in a fork does what it does as a user starts it."""
import pytest

from conftest import run

SCRIPT = """import atexit, multiprocessing, os, sys, threading, time
atexit.register(print, "at the end")
print(__name__, sys.argv, sys.path[0], os.getcwd(), os.environ.get("WORD"), multiprocessing.get_start_method())
print("a mistake", file=sys.stderr)
threading.Thread(target=lambda: (time.sleep(0.2), print("a thread's"))).start()
"""


@pytest.mark.parametrize("end, status", [
    ("", 0), ("sys.exit()", 0), ("sys.exit(2)", 2), ("raise ValueError('a fault')", 1), ("os.kill(os.getpid(), 9)", -9)])
def test_a_fork_is_as_a_fresh_process(tmp_path, end, status):
    (tmp_path / "script.py").write_text(SCRIPT + end)
    fork, user = (run(tmp_path / "script.py", "--flag", 1, env={"WORD": "a word"}, fresh=fresh) for fresh in (False, True))
    assert fork.returncode == user.returncode == status
    if status != -9:  # which leaves what is not written yet
        assert fork.stdout == user.stdout and "at the end" in fork.stdout
        assert fork.stderr.splitlines()[0] == "a mistake" and fork.stderr.splitlines()[-1] == user.stderr.splitlines()[-1]


def test_a_rank_that_fails_ends_the_others(tmp_path):
    (tmp_path / "script.py").write_text(
        "import os, time, torch.distributed as dist\ndist.init_process_group('gloo')\nranks = [None] * 2\n"
        "dist.all_gather_object(ranks, dist.get_rank())\nprint(ranks, flush=True)\nif dist.get_rank():\n    raise SystemExit(3)\ntime.sleep(600)\n")
    done = run(tmp_path / "script.py", ranks=2)
    lines = [line for line in done.stdout.splitlines() if not line.startswith("[Gloo]")]  # torch 2.9's own
    assert done.returncode == 3 and lines == ["[0, 1]"] * 2, done.stderr
