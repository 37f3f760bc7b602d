"""How the tests run a tool of data/."""
from conftest import run


def run_tool(name, *arguments, **more):
    """`python -m data.NAME ...` from the root. -> CompletedProcess"""
    return run(f"data/{name.replace('.', '/')}.py", *arguments, **more)
