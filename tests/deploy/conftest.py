"""What the tests of deploy/ share."""

import re

import pytest
import yaml
from machinery import DEPLOY, ROOT, Image, Processes, interpolated
from stack import Stack


@pytest.fixture(scope="module")
def processes():
    owned = Processes()
    yield owned
    owned.end()


@pytest.fixture(scope="module")
def image(processes):
    root = processes.home / "image"
    root.mkdir(mode=0o755)
    return Image(root)


@pytest.fixture(scope="session")
def compose():
    """compose.yaml with its merges and variables resolved."""
    return yaml.safe_load(interpolated((DEPLOY / "compose.yaml").read_text(), {"POSTGRES_PASSWORD": "sesame"}))


@pytest.fixture(scope="session")
def settings():
    """Every environment variable that the program knows."""
    text = (ROOT / "src/config/settings.rs").read_text()
    names = set(re.findall(r'"(DRAWBRIDGE_[A-Z_]+)"', text))
    assert len(names) > 30
    return names


@pytest.fixture(scope="module")
def stack(processes, compose, image):
    return Stack(processes, compose, image).start()
