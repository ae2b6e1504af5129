"""What README says of backups: what comes back is the state of then, and what that means."""

import base64
import json
import os
import signal
import subprocess
import urllib.request

from machinery import until
from stack import postgres_programs


def turn(stack, key, previous=None):
    """Status, and the response's id or the error's code."""
    said = {"model": "gpt-5.5", "input": "hi"} | ({"previous_response_id": previous} if previous else {})
    request = urllib.request.Request(
        f"{stack.balancer}/v1/responses", json.dumps(said).encode(), {"authorization": f"Bearer {key}", "content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.loads(answer.read())["id"]
    except urllib.error.HTTPError as refused:
        return refused.code, json.loads(refused.read())["error"]["code"]


def postgres(stack, program, *arguments):
    """One of the programs that an operator would use."""
    server = ["-h", "127.0.0.1", "-p", stack.port("postgres:5432"), "-U", "drawbridge"]
    user = "postgres" if os.geteuid() == 0 else None
    stack.processes.run([postgres_programs() / program, *server, *arguments], user, {"PGPASSWORD": stack.password})


def test_a_restore_means_what_readme_says(stack):
    dump = stack.processes.home / "dump"
    stack.login()
    then = stack.key("then")
    status, before = turn(stack, then)
    assert status == 200, before
    postgres(stack, "pg_dump", "--format=custom", f"--file={dump}", "drawbridge")

    status, since = turn(stack, then, before)
    assert status == 200, since
    later = stack.key("later")
    stack.cli("keys", "revoke", "then")
    expire = f"http://127.0.0.1:{stack.upstream}/__fake/accounts/alice/expire"
    urllib.request.urlopen(urllib.request.Request(expire, method="POST"), timeout=10).close()
    assert turn(stack, later)[0] == 200

    for replica in stack.replicas.values():
        replica.send_signal(signal.SIGTERM)
    assert [replica.wait(30) for replica in stack.replicas.values()] == [0, 0, 0]
    postgres(stack, "dropdb", "--force", "drawbridge")
    postgres(stack, "createdb", "drawbridge")
    postgres(stack, "pg_restore", "--dbname=drawbridge", "--no-owner", dump)
    for n in (1, 2, 3):
        stack.start_replica(n)

    assert stack.usage(1, later) == 401
    assert stack.usage(1, then) == 200
    # The login of then was refreshed since; its token was good for one refresh.
    assert turn(stack, then) == (503, "no_accounts")
    assert "reauth_required" in stack.cli("accounts", "list")
    stack.login()
    until("the account serves again", lambda: turn(stack, then)[0] == 200)
    assert turn(stack, then, before)[0] == 200
    assert turn(stack, then, since) == (400, "previous_response_not_found")

    wrong = stack.environment("cli") | {"DRAWBRIDGE_MASTER_KEYS": f"k1:{base64.b64encode(bytes(32)).decode()}"}
    del wrong["DRAWBRIDGE_MASTER_KEYS_FILE"]
    refused = subprocess.run(stack.image.command("serve"), env={"PATH": os.environ["PATH"], **wrong}, capture_output=True, text=True, check=False)
    assert refused.returncode == 64 and "does not belong to this database" in refused.stderr
