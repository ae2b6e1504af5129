"""compose.yaml says what it means: nothing it names is missing, every setting is one that the program knows, and everything is held down."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml
from machinery import DEPLOY, ROOT, interpolated, replaced, tool

OURS = ("drawbridge-1", "drawbridge-2", "drawbridge-3", "migrate", "cli")


def seconds(text):
    minutes, rest = re.fullmatch(r"(?:(\d+)m)?(?:(\d+)s)?", text).groups()
    return 60 * int(minutes or 0) + int(rest or 0)


def test_it_is_a_compose_file():
    tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", DEPLOY / "compose.yaml")


def test_the_password_is_not_optional():
    with pytest.raises(KeyError, match="POSTGRES_PASSWORD: run deploy/make-secrets"):
        interpolated((DEPLOY / "compose.yaml").read_text(), {})


def test_every_name_leads_somewhere(compose):
    for name, service in compose["services"].items():
        assert set(service.get("depends_on", [])) <= set(compose["services"]), name
        assert set(service["networks"]) <= set(compose["networks"]), name
        assert set(service.get("secrets", [])) <= set(compose["secrets"]), name
        for volume in service.get("volumes", []):
            source, *_, mode = volume.split(":")
            if source.startswith("."):
                assert (DEPLOY / source).exists() and mode == "ro", (name, source)
            else:
                assert source in compose["volumes"], name


def test_make_secrets_makes_every_secret_once(compose, tmp_path):
    script = tmp_path / "make-secrets"
    script.write_text((DEPLOY / "make-secrets").read_text())
    script.chmod(0o755)
    subprocess.run([script], check=True, capture_output=True)
    made = {file.name: file.read_text() for file in (tmp_path / "secrets").iterdir()}
    assert set(made) == {Path(secret["file"]).name for secret in compose["secrets"].values()}
    assert re.fullmatch(r"k1:[A-Za-z0-9+/]{43}=\n", made["master_keys"])
    password = re.fullmatch(r"POSTGRES_PASSWORD=([0-9a-f]{48})\n", (tmp_path / ".env").read_text())[1]
    assert made["pgbouncer_users"] == f'"drawbridge" "{password}"\n'
    assert (tmp_path / "secrets").stat().st_mode & 0o777 == 0o700
    assert subprocess.run([script], check=True, capture_output=True).stdout == b""
    assert made == {file.name: file.read_text() for file in (tmp_path / "secrets").iterdir()}


def test_no_secret_is_committed():
    listed = subprocess.run(["git", "check-ignore", "deploy/.env", "deploy/secrets/master_keys"], cwd=ROOT, capture_output=True, text=True)
    assert listed.stdout.split() == ["deploy/.env", "deploy/secrets/master_keys"]


def test_every_setting_is_one_that_the_program_knows(compose, settings):
    for name in OURS:
        given = {variable for variable in compose["services"][name]["environment"] if variable.startswith("DRAWBRIDGE_")}
        assert given and given <= settings, given - settings
    example = set(re.findall(r"^#?([A-Z_]+)=", (DEPLOY / ".env.example").read_text(), re.M))
    used = set(re.findall(r"\$\{([A-Z_]+)", (DEPLOY / "compose.yaml").read_text()))
    passed_on = {name for name, value in compose["services"]["cli"]["environment"].items() if value is None}
    assert example == used | passed_on


def test_everything_is_held_down(compose):
    for name, service in compose["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not service.get("privileged") and not service.get("cap_add"), name
        assert re.match(r"[\w-]+(\.[\w-]+)+/.+:(?!latest$)[\w.-]+$|drawbridge:local$", service["image"]), service["image"]
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), name


def test_databases_have_no_way_out(compose):
    assert compose["networks"]["back"]["internal"] is True
    for name in ("postgres", "pgbouncer", "redis"):
        assert compose["services"][name]["networks"] == ["back"], name


def test_nobody_is_stopped_before_the_drain_is_over(compose):
    defaults = (ROOT / "README.md").read_text()
    delay, grace = map(seconds, re.search(r"`DRAWBRIDGE_DRAIN_DELAY`, `_DRAIN_GRACE` \| `(\w+)`, `(\w+)`", defaults).groups())
    last_words = 10
    for name in ("drawbridge-1", "drawbridge-2", "drawbridge-3", "balancer"):
        assert seconds(compose["services"][name]["stop_grace_period"]) > delay + grace + last_words, name
    unit = (DEPLOY / "systemd/drawbridge.service").read_text()
    assert int(re.search(r"TimeoutStopSec=(\d+)", unit)[1]) > delay + grace + last_words


def test_replicas_differ_only_in_their_names(compose):
    replicas = [compose["services"][f"drawbridge-{n}"] for n in (1, 2, 3)]
    as_the_first = [replaced(yaml.dump(replica), [(f"drawbridge-{n}", "drawbridge-1")]) for n, replica in enumerate(replicas, 1)]
    assert as_the_first[0] == as_the_first[1] == as_the_first[2]


def test_balancer_and_prometheus_know_every_replica(compose):
    replicas = sorted(name for name in compose["services"] if re.fullmatch(r"drawbridge-\d", name))
    assert re.findall(r"server (drawbridge-\d):2455 resolve", (DEPLOY / "nginx/nginx.conf").read_text()) == replicas
    [job] = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())["scrape_configs"]
    assert job["static_configs"][0]["targets"] == [f"{name}:9464" for name in replicas]


def test_grafana_finds_its_source_and_its_dashboards(compose):
    [source] = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090" and "prometheus" in compose["services"]
    [provider] = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/drawbridge.yaml").read_text())["providers"]
    assert f"./grafana:{provider['options']['path']}:ro" in compose["services"]["grafana"]["volumes"]


def test_a_silent_stream_is_not_cut_for_an_hour():
    text = (DEPLOY / "nginx/nginx.conf").read_text()
    assert "proxy_read_timeout 3600s;" in text and "proxy_send_timeout 3600s;" in text


def test_the_unit_is_one_that_systemd_takes(tmp_path):
    """`verify` wants the program to be there; it is quiet about everything else or this fails."""
    unit = tmp_path / "drawbridge.service"
    text = (DEPLOY / "systemd/drawbridge.service").read_text()
    unit.write_text(replaced(text, [("/usr/local/bin/drawbridge serve", "/bin/true")]))
    verified = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert verified.returncode == 0 and str(unit.name) not in verified.stderr, verified.stderr
    rated = subprocess.run(["systemd-analyze", "security", "--offline=yes", "--threshold=20", unit], capture_output=True, text=True, check=False)
    assert rated.returncode == 0, rated.stdout[-300:]
