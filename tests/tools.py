"""How the tests run a tool of data/."""
import os
import subprocess
import sys

from conftest import ROOT


def run_tool(name, *arguments, env=None, ranks=None):
    """`python -m data.NAME ...` from the root, as a user runs it. -> CompletedProcess"""
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "-m"] if ranks else []
    return subprocess.run([sys.executable, "-m", *launch, f"data.{name}", *map(str, arguments)], cwd=ROOT, text=True,
                          capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})})
