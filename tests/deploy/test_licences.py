"""deny.toml allows exactly the licences that the tree needs. cargo-deny itself takes minutes to build, so `make deny` is not part of `make test`."""

import json
import re
import subprocess
import tomllib

import pytest
from machinery import ROOT

DENY = tomllib.loads((ROOT / "deny.toml").read_text())
ALLOWED = set(DENY["licenses"]["allow"])


def permitted(expression, allowed):
    """Whether an SPDX expression (or the old `A/B`) can be met with these licences. AND binds tighter than OR."""
    words = re.findall(r"[()]|[\w.+-]+(?: WITH [\w.-]+)?", expression.replace("/", " OR "))
    known = {"(": "(", ")": ")", "OR": "or", "AND": "and"}
    return eval(" ".join(known.get(word, str(word in allowed)) for word in words))


@pytest.fixture(scope="module")
def packages():
    command = ["cargo", "metadata", "--locked", "--format-version", "1"]
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout)["packages"]


@pytest.mark.parametrize(("expression", "expected"), [
    ("MIT", True), ("GPL-3.0", False), ("MIT/GPL-3.0", True), ("MIT OR GPL-3.0", True), ("MIT AND GPL-3.0", False),
    ("GPL-3.0 OR MIT AND MIT", True), ("(GPL-3.0 OR MIT) AND GPL-3.0", False), ("MIT WITH LLVM-exception", False),
])
def test_expressions_are_read_as_they_are_meant(expression, expected):
    assert permitted(expression, {"MIT"}) is expected


def test_every_crate_may_be_used(packages):
    assert len(packages) > 100
    for package in packages:
        assert package["license"] and permitted(package["license"], ALLOWED), (package["name"], package["license"])


def test_no_licence_is_allowed_that_nothing_needs(packages):
    for licence in ALLOWED:
        assert any(not permitted(package["license"], ALLOWED - {licence}) for package in packages), licence


def test_every_crate_comes_from_the_registry_and_none_is_banned(packages):
    banned = {entry["crate"] for entry in DENY["bans"]["deny"]}
    sources = {package["source"] for package in packages} - {None}
    assert len(sources) == 1 and DENY["sources"] == {"unknown-registry": "deny", "unknown-git": "deny"}
    assert not banned & {package["name"] for package in packages}
