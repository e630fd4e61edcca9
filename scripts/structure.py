"""Write the module list of docs/structure.md from the modules' own first sentences; --check only compares."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "structure.md"
BEGIN, END = "<!-- modules: written by `make docs` -->", "<!-- end of modules -->"
ROOMS = ("tailrace", "services")


def modules() -> Iterator[str]:
    """A heading for each folder, a line for each module."""
    folders = sorted({path.parent for room in ROOMS for path in (ROOT / room).rglob("*.py")})
    for folder in folders:
        name = folder.relative_to(ROOT).as_posix()
        files = [path for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"]
        room = _first_paragraph(folder / "__init__.py")
        if name != "tailrace/rpc/gen" and (files or room):
            yield f"\n### `{name}/`\n" + (f"\n{room}\n" if room else "")
            for path in files:
                yield f"- `{path.name}`: {_first_paragraph(path)}"


def _first_paragraph(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


def main() -> int:
    page = PAGE.read_text(encoding="utf-8")
    before, after = page.partition(BEGIN)[0], page.partition(END)[2]
    fresh = f"{before}{BEGIN}\n" + "\n".join(modules()) + f"\n\n{END}{after}"
    if "--check" in sys.argv:
        if fresh != page:
            print("docs/structure.md is out of date; run make docs")
        return int(fresh != page)
    PAGE.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
