"""Real programs, started from the files of deploy/.

There is no container engine here. What the files say is proved by running the programs that they configure as processes on loopback:
only hosts, ports and paths are replaced.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
BIN = Path(os.environ.get("DRAWBRIDGE_TARGET", ROOT / "target" / "debug"))
os.environ["PATH"] += ":/usr/sbin"


def tool(name, *arguments, **options):
    """Runs a program of this Python environment; what it complains of is the failure."""
    command = [Path(sys.executable).parent / name, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{name}: {done.stdout}{done.stderr}"
    return done.stdout


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def until(what, condition, seconds=30):
    """Waits for a condition and says which one did not come true."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} within {seconds} s"
        time.sleep(0.05)
    return value


def replaced(text, pairs):
    """Each pair must be found, so that a test never runs something else than the file."""
    for old, new in pairs:
        assert old in text, old
        text = text.replace(old, new)
    return text


def get(url, key=None):
    """Status and body, whatever the status; 0 if nobody answers."""
    request = urllib.request.Request(url, headers={"authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as refused:
        return refused.code, refused.read().decode()
    except OSError:
        return 0, ""


class Processes:
    """Started programs, ended in reverse when the test is over. As root each runs as the user that its container has."""

    def __init__(self):
        self.home = Path(tempfile.mkdtemp(prefix="drawbridge-deploy-"))
        self.home.chmod(0o1777)
        self.running = []

    def identity(self, user):
        return {"user": user, "group": user, "extra_groups": []} if user and os.geteuid() == 0 else {}

    def run(self, command, user=65532, environment=None):
        """Runs to the end; the output."""
        done = subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, check=False, cwd="/",
            env={"PATH": os.environ["PATH"], **(environment or {})}, **self.identity(user),
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def start(self, name, command, user=65532, environment=None):
        with open(self.home / f"{name}.log", "wb") as log:
            child = subprocess.Popen(
                [str(part) for part in command], stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd="/",
                env={"PATH": os.environ["PATH"], **(environment or {})}, **self.identity(user),
            )
        self.running.append(child)
        return child

    def log(self, name):
        return (self.home / f"{name}.log").read_text(errors="replace")

    def listens(self, name, child, port):
        """Waits until the started program accepts connections."""
        def accepts():
            assert child.poll() is None, f"{name} ended: {self.log(name)}"
            with socket.socket() as client:
                return client.connect_ex(("127.0.0.1", port)) == 0
        until(f"{name} listens", accepts)

    def end(self):
        for child in reversed(self.running):
            # Postgres leaves at once, and nginx with its workers; nothing is owed to the others.
            ends = {"postgres": signal.SIGQUIT, "nginx": signal.SIGTERM}
            child.send_signal(ends.get(Path(child.args[0]).name, signal.SIGKILL))
            child.wait(timeout=20)
        shutil.rmtree(self.home, ignore_errors=True)


def nginx(processes, upstreams):
    """The real nginx.conf with loopback in place of the three replicas; the port that it listens on."""
    port, home = free_port(), processes.home
    text = replaced((DEPLOY / "nginx/nginx.conf").read_text(), [
        *((f"server drawbridge-{n}:2455 resolve", f"server 127.0.0.1:{to}") for n, to in enumerate(upstreams, 1)),
        ("listen 8080", f"listen 127.0.0.1:{port}"), ("/tmp/", f"{home}/"), ("/dev/stdout", f"{home}/access.log"),
        ("/dev/stderr", f"{home}/nginx-error.log"), ("worker_processes auto", "worker_processes 1"),
    ])
    file = home / "nginx.conf"
    file.write_text(text)
    file.chmod(0o644)
    error_log = ("-e", home / "nginx-error.log")
    processes.run(["nginx", "-t", "-q", *error_log, "-c", file], user=101)
    child = processes.start("nginx", ["nginx", *error_log, "-c", file, "-g", "daemon off;"], user=101)
    processes.listens("nginx", child, port)
    return port


class Image:
    """The final image as a directory: what the Dockerfile copies over what its base is known to hold. As root the program runs in there."""

    # Of the packages of distroless/cc: libc6 and libgcc-s1. The loader's name depends on the machine.
    LIBRARIES = {"libc.so.6", "libm.so.6", "libgcc_s.so.1"}

    def __init__(self, root):
        self.root = root
        listed = subprocess.run(["ldd", BIN / "drawbridge"], capture_output=True, text=True, check=True).stdout
        self.libraries = {Path(path).name: Path(path) for path in re.findall(r"(/\S+) \(0x", listed)}
        self.put(BIN / "drawbridge", "usr/local/bin/drawbridge")
        for path in self.libraries.values():
            self.put(path, path.relative_to("/"))

    def put(self, source, name):
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, self.root / name)

    def command(self, *arguments):
        """Runs the program with 65532 as user and group in a root where that user may write nothing."""
        if os.geteuid() != 0:
            return [BIN / "drawbridge", *arguments]
        return ["chroot", "--userspec=65532:65532", "--groups=", self.root, "/usr/local/bin/drawbridge", *arguments]


def interpolated(text, environment):
    """As Compose does it: ${NAME:-default} and ${NAME:?complaint}."""
    def value(match):
        name, operator, word = match.groups()
        if not environment.get(name) and operator == ":?":
            raise KeyError(f"{name}: {word}")
        return environment.get(name) or word
    return re.sub(r"\$\{(\w+)(:[-?])([^}]*)\}", value, text)
