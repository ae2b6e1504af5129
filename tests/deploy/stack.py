"""compose.yaml, run without containers: Postgres, PgBouncer, Redis, three replicas and the balancer from its very environment.

Names of hosts become loopback addresses; everything else is what a container would get: settings, secrets with their owners, commands,
order, the users of the programs, and for Drawbridge a root with nothing in it but what the image holds, where it may write nothing.
"""

import os
import shutil
import subprocess
import urllib.request
from pathlib import Path

from machinery import BIN, DEPLOY, free_port, get, nginx, replaced, until


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
        command = [BIN / "loadtest", "upstream", "--lean", "--listen", f"127.0.0.1:{self.upstream}"]
        child = self.processes.start("upstream", command, user=None)
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

    def login(self):
        """Stores the one account of the pool, as upstream has it now."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.upstream}/__fake/accounts", b'{"name":"alice"}', {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            self.cli("accounts", "import", "-", stdin=answer.read().decode())

    def key(self, name):
        """A new client key that every replica knows."""
        key = self.cli("keys", "create", "--name", name, "--quiet").strip()
        until("every replica knows the key", lambda: all(self.usage(n, key) == 200 for n in (1, 2, 3)))
        return key

    def usage(self, n, key):
        return get(f"http://{self.hosts[f'drawbridge-{n}:2455']}/v1/usage", key)[0]
