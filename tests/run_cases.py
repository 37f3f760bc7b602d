"""Several runs of train_clip.py one after another, in the ranks that torchrun started once: starting them is what costs.

    torchrun --standalone --nproc_per_node 3 tests/run_cases.py '[["--captions", ...], ...]'
"""
import functools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import train_clip as T  # noqa: E402

if __name__ == "__main__":
    T.projection_head = functools.partial(T.projection_head, hidden=64, out=16)  # of --ssl; 17 M parameters otherwise
    T.start_ranks = functools.cache(T.start_ranks)  # one process group for all of them
    leave, T.dist.destroy_process_group = T.dist.destroy_process_group, lambda: None
    for arguments in json.loads(sys.argv[1]):
        T.main(arguments)
    if T.dist.is_initialized():
        leave()
