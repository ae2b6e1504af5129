"""What a client, an operator and a peer see of compose.yaml when it runs."""

import json
import os
import signal
import subprocess
import urllib.request

import pytest
from machinery import ROOT, get, until

CODEX = ROOT / ".tools/node_modules/.bin/codex"


@pytest.fixture(scope="module")
def key(stack):
    """A client's key; the pool behind it has one account."""
    stack.login()
    made = stack.key("laptop")
    until("every replica knows the account", lambda: all(
        "gpt" in get(f"http://{stack.hosts[f'drawbridge-{n}:2455']}/v1/models", made)[1] for n in (1, 2, 3)))
    return made


def test_three_replicas_share_the_pool_and_know_how_to_reach_each_other(stack):
    stack.cli("config", "--strict")
    text = stack.cli("replicas", "list")
    for n in (1, 2, 3):
        assert f"drawbridge-{n}" in text and stack.hosts[f"drawbridge-{n}:2456"] in text, text
        metrics = get(f"http://{stack.hosts[f'drawbridge-{n}:9464']}/metrics")[1]
        assert "drawbridge_redis_connected 1" in metrics


def test_the_balancer_is_ready_and_lets_nobody_in_without_a_key(stack):
    assert get(f"{stack.balancer}/readyz")[0] == 200
    assert get(f"{stack.balancer}/v1/usage")[0] == 401
    assert get(f"{stack.balancer}/v1/usage", stack.key("no accounts yet"))[0] == 200
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
