"""Writes the tables of README.md and docs/results.md from the JSON files in benchmarks/results.

    python benchmarks/write_tables.py            rewrites what stands between the marks
    python benchmarks/write_tables.py --check    exits with status 1 if that would change anything

A table stands between ``<!-- NAME.json -->`` and ``<!-- end -->``; the README's, which draws on
several files, between ``<!-- summary -->`` and ``<!-- end -->``.
"""

import argparse
import re
import sys

from environment import REPOSITORY
from readme_table import summary
from result_tables import DEFAULT_OUTPUTS, TABLES, load

PAGES = (REPOSITORY / "README.md", REPOSITORY / "docs" / "results.md")


def rendered(text: str) -> str:
    """A page with every marked table made anew."""

    def table(match):
        mark = match[1]
        if mark == "summary":
            made = summary()
        else:
            name = mark.removesuffix(".json")
            known = name in DEFAULT_OUTPUTS
            output = "" if known else f" --output=benchmarks/results/{name}.json"
            made = TABLES[name](load(name), output)
        return f"<!-- {mark} -->\n{made}\n<!-- end -->"

    return re.sub(r"<!-- (\w+\.json|summary) -->.*?<!-- end -->", table, text, flags=re.DOTALL)


def main() -> None:
    """Rewrite or check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    for page in PAGES:
        old = page.read_text()
        new = rendered(old)
        if check and new != old:
            sys.exit(f"{page.name} differs from its results: run python benchmarks/write_tables.py")
        if new != old:
            page.write_text(new)


if __name__ == "__main__":
    main()
