"""compose.yaml, run without containers: Postgres, PgBouncer, Redis, three replicas and the balancer from its very environment.

Names of hosts become loopback addresses; everything else is what a container would get: settings, secrets with their owners, commands,
order, the users of the programs, and for Drawbridge a root with nothing in it but what the image holds, where it may write nothing.
"""

import json
import os
import shutil
import signal
import subprocess
import urllib.request
from pathlib import Path

import pytest
from conftest import BIN, DEPLOY, ROOT, free_port, get, nginx, replaced, until

CODEX = ROOT / ".tools/node_modules/.bin/codex"


def postgres_programs():
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb")) or [Path(shutil.which("initdb"))]
    return found[-1].parent


class Stack:
    def __init__(self, processes, compose, image):
        self.processes, self.compose, self.image, home = processes, compose, image, processes.home
        shutil.copytree(DEPLOY, home / "deploy", ignore=shutil.ignore_patterns(".env", "secrets"))
        subprocess.run([home / "deploy/make-secrets"], check=True, capture_output=True)
        # A container gets each file mounted, with its owner and mode; here the way to it has to be passable.
        self.secrets = home / "deploy/secrets"
        self.secrets.chmod(0o711)
        self.in_image = "/run/secrets" if os.geteuid() == 0 else str(self.secrets)
        image.put(self.secrets / "master_keys", "run/secrets/master_keys")
        owner = (self.secrets / "master_keys").stat()
        os.chown(image.root / "run/secrets/master_keys", owner.st_uid, owner.st_gid)
        env = (home / "deploy/.env").read_text()
        self.password = env.removeprefix("POSTGRES_PASSWORD=").strip()
        self.hosts = {name: f"127.0.0.1:{free_port()}" for name in [
            "postgres:5432", "pgbouncer:6432", "redis:6379", *(f"drawbridge-{n}:{port}" for n in (1, 2, 3) for port in (2455, 2456, 9464))]}

    def port(self, host):
        return int(self.hosts[host].rpartition(":")[2])

    def environment(self, service):
        """Of the image, and of the service over it, with hosts and the secret replaced."""
        given = {
            "DRAWBRIDGE_LISTEN": "0.0.0.0:2455", "DRAWBRIDGE_ADMIN_LISTEN": "0.0.0.0:9464", "HOME": "/home/nonroot",
            **{name: value for name, value in self.compose["services"][service]["environment"].items() if value is not None},
        }
        for name, value in given.items():
            for host, there in self.hosts.items():
                value = value.replace(host, there)
            for port in (2455, 2456, 9464):
                if service.startswith("drawbridge-"):
                    value = value.replace(f"0.0.0.0:{port}", self.hosts[f"{service}:{port}"])
            given[name] = value.replace("sesame", self.password).replace("/run/secrets", self.in_image)
        # Of ours alone: upstream, and no long farewell.
        upstream = f"http://127.0.0.1:{self.upstream}"
        return given | {
            "DRAWBRIDGE_UPSTREAM_URL": f"{upstream}/backend-api", "DRAWBRIDGE_AUTH_URL": upstream, "DRAWBRIDGE_DRAIN_DELAY": "300ms",
        }

    def start_upstream(self):
        self.upstream = free_port()
        child = self.processes.start("upstream", [BIN / "loadtest", "upstream", "--lean", "--listen", f"127.0.0.1:{self.upstream}"])
        self.processes.listens("upstream", child, self.upstream)

    def start_postgres(self):
        programs, data, port = postgres_programs(), self.processes.home / "postgres", self.port("postgres:5432")
        user = "postgres" if os.geteuid() == 0 else None
        password = self.processes.home / "password"
        password.write_text(self.password)
        password.chmod(0o644)
        self.processes.run(
            [programs / "initdb", "-D", data, "-U", "drawbridge", "--auth=scram-sha-256", f"--pwfile={password}", "--no-sync"], user)
        child = self.processes.start("postgres", [
            programs / "postgres", "-D", data, "-p", port, "-k", self.processes.home, "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"], user)
        self.processes.listens("postgres", child, port)
        create = [programs / "createdb", "-h", "127.0.0.1", "-p", port, "-U", "drawbridge", "drawbridge"]
        self.processes.run(create, user, {"PGPASSWORD": self.password})

    def start_pgbouncer(self):
        host, port = self.hosts["pgbouncer:6432"].split(":")
        file = self.processes.home / "pgbouncer.ini"
        file.write_text(replaced((DEPLOY / "pgbouncer/pgbouncer.ini").read_text(), [
            ("host=postgres port=5432", f"host=127.0.0.1 port={self.port('postgres:5432')}"),
            ("listen_addr = 0.0.0.0", f"listen_addr = {host}"), ("listen_port = 6432", f"listen_port = {port}"),
            ("/run/secrets", str(self.secrets)),
        ]))
        file.chmod(0o644)
        child = self.processes.start("pgbouncer", ["pgbouncer", file], user=70)
        self.processes.listens("pgbouncer", child, int(port))

    def start_redis(self):
        command = [str(part) for part in self.compose["services"]["redis"]["command"]]
        port = self.port("redis:6379")
        child = self.processes.start("redis", [*command, "--port", port, "--bind", "127.0.0.1", "--dir", self.processes.home], user=999)
        self.processes.listens("redis", child, port)

    def start_replica(self, n):
        service = f"drawbridge-{n}"
        self.replicas[n] = self.processes.start(service, self.image.command("serve"), user=None, environment=self.environment(service))
        until(f"{service} is ready", lambda: get(f"http://{self.hosts[f'{service}:9464']}/readyz")[0] == 200)

    def start(self):
        self.start_upstream()
        self.start_postgres()
        self.start_pgbouncer()
        self.start_redis()
        migrate = self.compose["services"]["migrate"]["command"]
        self.processes.run(self.image.command(*migrate), user=None, environment=self.environment("migrate"))
        self.replicas = {}
        for n in (1, 2, 3):
            self.start_replica(n)
        self.balancer = f"http://127.0.0.1:{nginx(self.processes, [self.port(f'drawbridge-{n}:2455') for n in (1, 2, 3)])}"
        return self

    def cli(self, *arguments, stdin=None):
        """As `docker compose run --rm cli ...`."""
        done = subprocess.run(
            self.image.command(*arguments), env={"PATH": os.environ["PATH"], **self.environment("cli")}, input=stdin,
            capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def stack(processes, compose, image):
    return Stack(processes, compose, image).start()


@pytest.fixture(scope="module")
def key(stack):
    """A client's key; the pool behind it has one account."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{stack.upstream}/__fake/accounts", json.dumps({"name": "alice"}).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        stack.cli("accounts", "import", "-", stdin=answer.read().decode())
    made = stack.cli("keys", "create", "--name", "laptop", "--quiet").strip()
    until("every replica knows the key and the account", lambda: all(
        "gpt" in get(f"http://{stack.hosts[f'drawbridge-{n}:2455']}/v1/models", made)[1] for n in (1, 2, 3)))
    return made


def test_three_replicas_share_the_pool_and_know_how_to_reach_each_other(stack):
    replicas = json.loads(stack.cli("replicas", "list", "--json"))
    text = json.dumps(replicas)
    for n in (1, 2, 3):
        assert f"drawbridge-{n}" in text and stack.hosts[f"drawbridge-{n}:2456"] in text, text
        metrics = get(f"http://{stack.hosts[f'drawbridge-{n}:9464']}/metrics")[1]
        assert "drawbridge_redis_connected 1" in metrics
        log = stack.processes.log(f"drawbridge-{n}")
        assert "WARN" not in log and '"level":"WARN"' not in log, log


def test_the_balancer_is_ready_and_lets_nobody_in_without_a_key(stack):
    assert get(f"{stack.balancer}/readyz")[0] == 200
    assert get(f"{stack.balancer}/v1/usage")[0] == 401
    key = stack.cli("keys", "create", "--name", "no accounts yet", "--quiet").strip()
    until("the key is known", lambda: all(get(f"{stack.balancer}/v1/usage", key)[0] == 200 for _ in range(6)))
    # What is for operators and for peers has listeners of its own, which the balancer does not know.
    assert get(f"{stack.balancer}/metrics")[0] == 404
    assert get(f"{stack.balancer}/internal/v1/bridge/turn")[0] == 404


def test_a_turn_goes_through_the_balancer(stack, key):
    request = urllib.request.Request(
        f"{stack.balancer}/v1/responses", b'{"model":"gpt-5.5","input":"say hi","stream":true}',
        {"authorization": f"Bearer {key}", "content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        assert "response.completed" in answer.read().decode()


@pytest.mark.parametrize("websockets", ["false", "true"])
def test_the_codex_cli_talks_through_the_balancer(stack, key, tmp_path, websockets):
    settings = {
        "model": '"gpt-5.5"', "model_provider": '"drawbridge"', "check_for_update_on_startup": "false", "analytics.enabled": "false",
        "otel.exporter": '"none"', "otel.metrics_exporter": '"none"', "otel.trace_exporter": '"none"', "features.plugins": "false", "features.apps": "false",
        "model_providers.drawbridge": f'{{name = "drawbridge", base_url = "{stack.balancer}/backend-api/codex", wire_api = "responses", '
        f'env_key = "DRAWBRIDGE_KEY", supports_websockets = {websockets}}}',
    }
    (tmp_path / "config.toml").write_text("".join(f"{name} = {value}\n" for name, value in settings.items()))
    codex = [CODEX, "exec", "--json", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox"]
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "CODEX_HOME": str(tmp_path), "DRAWBRIDGE_KEY": key, "NO_PROXY": "127.0.0.1"}
    for command in ([*codex, "-C", tmp_path, "say hi"], [*codex[:2], "resume", "--last", *codex[2:], "and again"]):
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=60)
        events = [json.loads(line)["type"] for line in done.stdout.splitlines()]
        assert done.returncode == 0 and "turn.completed" in events and "error" not in events, done
    if websockets == "true":
        assert '"status":101' in (stack.processes.home / "access.log").read_text()


def test_a_replica_is_replaced_without_a_refused_request(stack, key):
    old = stack.replicas[2]
    old.send_signal(signal.SIGTERM)
    asked = 0
    while old.poll() is None or asked < 30:
        status, body = get(f"{stack.balancer}/v1/models", key)
        assert status == 200, (status, body)
        asked += 1
    assert old.returncode == 0, stack.processes.log("drawbridge-2")
    stack.start_replica(2)
    assert all(get(f"{stack.balancer}/v1/models", key)[0] == 200 for _ in range(30))
