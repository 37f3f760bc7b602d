"""List the tools of data/: python -m data"""
import ast
from pathlib import Path


def tools():
    """Yield (name, the first line of its text) for every command of this folder."""
    for path in sorted(Path(__file__).parent.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if path.stem != "__main__" and '__name__ == "__main__"' in text:
            yield path.stem, ast.get_docstring(ast.parse(text)).splitlines()[0]


if __name__ == "__main__":
    print("Run one as `python -m data.NAME`; --help lists its options.\n")
    for name, about in tools():
        print(f"{name:22}{about}")
