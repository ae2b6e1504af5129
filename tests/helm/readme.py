"""Writes the table of values in the chart's README from the comments of values.yaml: .tools/helm/bin/python tests/helm/readme.py"""

import json
import re

import yaml

from chart import CHART

VALUES, README = CHART / "values.yaml", CHART / "README.md"
BEGIN, END = "<!-- values: tests/helm/readme.py writes what follows -->\n", "<!-- values end -->\n"


def rows():
    """(path, default, comment) of each value that has a comment, in the file's order. A map without one is described by its members."""
    path, comment, defaults = [], None, yaml.safe_load(VALUES.read_text())
    for line in VALUES.read_text().splitlines():
        if found := re.fullmatch(r"\s*# -- (.*)", line):
            comment = found[1]
        elif found := re.fullmatch(r"( *)([A-Za-z]\w*):.*", line):
            path = path[: len(found[1]) // 2] + [found[2]]
            if comment:
                value = defaults
                for key in path:
                    value = value[key]
                yield ".".join(path), value, comment
                comment = None


def table():
    lines = [f"| `{path}` | `{json.dumps(default)}` | {comment.replace('|', chr(92) + '|')} |\n" for path, default, comment in rows()]
    return "| value | default | |\n|---|---|---|\n" + "".join(lines)


def current():
    """The README as it should be."""
    text = README.read_text()
    before, rest = text.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    README.write_text(current())
