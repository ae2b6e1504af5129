"""What runs on GitHub is what runs here, is pinned, and may do no more than it must."""

import re
import subprocess

import pytest
import yaml
from machinery import ROOT, tool

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
NAMES = [file.name for file in WORKFLOWS]
MAY_WRITE = {("release.yml", "image"): {"packages"}, ("release.yml", "publish"): {"attestations", "id-token", "packages"},
             ("release.yml", "release"): {"contents"}}


def jobs(file):
    return yaml.safe_load(file.read_text())["jobs"].items()


def steps(file):
    return [step for _, job in jobs(file) for step in job.get("steps", [])]


def test_they_are_what_their_formats_say():
    assert NAMES == ["ci.yml", "release.yml"]
    tool("check-jsonschema", "--builtin-schema", "vendor.github-workflows", *WORKFLOWS)
    tool("check-jsonschema", "--builtin-schema", "vendor.dependabot", ROOT / ".github/dependabot.yml")


@pytest.mark.parametrize("file", WORKFLOWS, ids=NAMES)
def test_every_action_is_pinned_to_a_commit_and_says_which_version_that_is(file):
    used = re.findall(r"uses: (\S+)(.*)", file.read_text())
    assert used
    for action, comment in used:
        if not action.startswith("./"):
            assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action), action
            assert re.fullmatch(r" # v\d+\.\d+\.\d+", comment), action


def test_an_action_is_pinned_to_one_commit_everywhere():
    used = {tuple(action.split("@")) for file in WORKFLOWS for action in re.findall(r"uses: ([^./]\S+)", file.read_text())}
    assert len({name for name, _ in used}) == len(used), used


@pytest.mark.parametrize("file", WORKFLOWS, ids=NAMES)
def test_nothing_is_permitted_but_what_a_job_names(file):
    assert yaml.safe_load(file.read_text())["permissions"] == {}
    for name, job in jobs(file):
        writes = {what for what, how in job["permissions"].items() if how != "read"}
        assert writes == MAY_WRITE.get((file.name, name), set()), name
        assert "uses" in job or job["timeout-minutes"] <= 90, name
    for step in steps(file):
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


def test_every_make_target_exists():
    wanted = {name for file in WORKFLOWS for step in steps(file) for name in re.findall(r"\bmake ([\w-]+)", step.get("run", ""))}
    assert wanted
    for name in wanted:
        subprocess.run(["make", "--dry-run", name], cwd=ROOT, check=True, capture_output=True)


def test_the_auditor_finds_nothing():
    tool("zizmor", "--offline", "--no-progress", ROOT / ".github")
