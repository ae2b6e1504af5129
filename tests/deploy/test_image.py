"""The Dockerfile: what it copies is there, what runs is small, and its program starts with nothing else around it."""

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path

from machinery import DEPLOY, ROOT, replaced, tool

DOCKERFILE = DEPLOY / "Dockerfile"


def instructions():
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.M).replace("\\\n", " ")
    return [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]


def last(word):
    return [rest for name, rest in instructions() if name == word][-1]


def test_the_linter_has_nothing_to_say():
    tool("hadolint", DOCKERFILE)


def test_every_source_of_a_copy_exists_and_is_sent_to_the_builder():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    sent = [line[1:] for line in ignored if line.startswith("!")]
    copies = [rest.split() for name, rest in instructions() if name == "COPY" and "--from" not in rest]
    sources = [source for *sources, _ in copies for source in sources]
    assert len(sources) >= 7
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(source.startswith(name) for name in sent), source
    # The other way round: nothing is sent that is not copied.
    assert all(any(source.startswith(name) for source in sources) for name in sent)


def test_cargo_takes_the_stand_ins_for_the_workspace(tmp_path):
    """The steps up to the first build, in an empty directory; cargo reads what it would build. A target or member that is new fails here."""
    for name, rest in instructions():
        if name == "COPY":
            *sources, to = rest.split()
            for source in sources:
                there = tmp_path / to / Path(source).name if to.endswith("/") else tmp_path / to
                there.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / source, there)
        if name == "RUN":
            script = replaced(rest, [("cargo build --locked --release --bin drawbridge", "cargo metadata --locked --no-deps --format-version 1")])
            said = subprocess.run(["sh", "-ec", script], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
            targets = [target["name"] for package in json.loads(said)["packages"] for target in package["targets"]]
            assert {"drawbridge", "loadtest", "build-script-build"} <= set(targets)
            return


def test_images_are_named_in_full_with_a_version():
    for name, rest in instructions():
        if name == "FROM":
            assert re.match(r"[\w-]+(\.[\w-]+)+/[\w/-]+:(?!latest\b)[\w.-]+( |$)", rest), rest


def test_the_toolchain_is_the_one_of_the_manifest():
    wanted = re.search(r'rust-version = "([\d.]+)"', (ROOT / "Cargo.toml").read_text())[1]
    assert f"rust:{wanted}-" in next(rest for name, rest in instructions() if name == "FROM")


def test_it_runs_as_a_user_with_a_number_and_without_a_shell():
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", last("USER"))
    assert (last("ENTRYPOINT"), last("CMD")) == ('["drawbridge"]', '["serve"]')


def test_the_program_needs_no_library_that_the_base_has_not(image):
    needed = {name for name in image.libraries if not name.startswith("ld-linux")}
    assert needed and needed <= image.LIBRARIES, needed


def test_the_program_starts_where_nothing_else_is(image):
    environment = {name: value for name, value in re.findall(r"(DRAWBRIDGE_\w+)=(\S+)", last("ENV"))}
    assert set(environment) == {"DRAWBRIDGE_LISTEN", "DRAWBRIDGE_ADMIN_LISTEN"}
    version = re.search(r'^version = "([\d.]+)"', (ROOT / "Cargo.toml").read_text(), re.M)[1]
    assert version in subprocess.run(image.command("--version"), capture_output=True, text=True, check=True).stdout
    environment |= {
        "HOME": "/home/nonroot", "PATH": "/usr/sbin:/usr/bin:/bin", "DRAWBRIDGE_DATABASE_URL": "postgres://u@h/d",
        "DRAWBRIDGE_MASTER_KEYS": f"k1:{base64.b64encode(bytes(32)).decode()}",
    }
    done = subprocess.run(image.command("config", "--strict"), env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "0.0.0.0:2455" in done.stdout, done
