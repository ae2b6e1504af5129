"""What runs: its settings, its rights, its end, and who reaches it."""

import re

import pytest
import yaml

from chart import CASES, CHART, REQUIRED, ROOT, container, env, merge, of_kind, only, pods, render, selects

SOURCE = {name: (ROOT / "src" / f"{name}.rs").read_text() for name in ("config", "config/settings", "server", "ledger")}
#: Settings of the program that the chart leaves alone, and why.
NOT_SET = {
    "DRAWBRIDGE_INTERNAL_URL": "the listener's address is the pod's",
    "DRAWBRIDGE_MASTER_KEYS": "a file is not in the environment of every process",
    "DRAWBRIDGE_REQUIRE_API_KEY": "a listener that is not on loopback always wants a key",
    "DRAWBRIDGE_TEST_TIME_SCALE": "for tests",
}


def server(values=REQUIRED):
    return only(render(values), "Deployment")["spec"]["template"]


def ports(template):
    return {it["name"]: it["containerPort"] for it in container(template)["ports"]}


def test_every_setting_is_one_of_the_program_and_every_one_can_be_set():
    known = set(re.findall(r'env = "(DRAWBRIDGE_\w+)"', SOURCE["config/settings"]))
    assert {name for name in env(server(CASES["everything"])) if name.startswith("DRAWBRIDGE_")} == known - NOT_SET.keys()


def test_the_values_have_the_programs_defaults():
    defaults = dict(re.findall(r'"(DRAWBRIDGE_\w+)",\s*self\.\w+,\s*"([^"]*)"', SOURCE["config"]))
    # Collectors parse it.
    defaults["DRAWBRIDGE_LOG_FORMAT"] = "json"
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    for key, value in values["settings"].items():
        name = "DRAWBRIDGE_" + re.sub(r"([A-Z])", r"_\1", key).upper()
        text = "" if value == {} else str(value).lower() if isinstance(value, bool) else str(value)
        assert text == defaults[name], name
    drain = values["drain"]
    assert f"{drain['delaySeconds']}s" == defaults["DRAWBRIDGE_DRAIN_DELAY"]
    assert f"{drain['graceSeconds']}s" == defaults["DRAWBRIDGE_DRAIN_GRACE"]


def test_numbers_and_lists_are_written_as_the_program_reads_them():
    settings = {"maxSessions": 2000000, "planWeights": {"pro": 6.67, "team": 2}, "modelAliases": {"b": "y", "a": "x"}, "hideQuota": True}
    found = env(server(merge(REQUIRED, {"settings": settings})))
    assert found["DRAWBRIDGE_MAX_SESSIONS"] == "2000000"
    assert found["DRAWBRIDGE_PLAN_WEIGHTS"] == "pro=6.67,team=2"
    assert found["DRAWBRIDGE_MODEL_ALIASES"] == "a=x,b=y"
    assert found["DRAWBRIDGE_HIDE_QUOTA"] == "true"


def test_jobs_have_the_settings_of_the_replicas():
    found = {name: env(template) for name, template in pods(render(CASES["everything"])).items()}
    assert found["drawbridge-migrate"] == found["drawbridge"]
    key = {"DRAWBRIDGE_KEY": {"secretKeyRef": {"name": "drawbridge-doctor", "key": "key"}}}
    assert found["drawbridge-doctor"] == found["drawbridge"] | key


@pytest.mark.parametrize("case, command", [("defaults", ["doctor"]), ("everything", ["doctor", "--through", "https://drawbridge.example.com"])])
def test_the_doctor_looks_through_the_way_that_clients_come(case, command):
    assert container(pods(render(CASES[case]))["drawbridge-doctor"])["args"] == command


def test_secrets_come_from_where_the_values_say():
    found = env(server(CASES["everything"]))
    ref = lambda secret, key: {"secretKeyRef": {"name": secret, "key": key}}
    assert found["DRAWBRIDGE_DATABASE_URL"] == ref("drawbridge-database", "url")
    assert found["DRAWBRIDGE_DATABASE_DIRECT_URL"] == ref("drawbridge-database", "direct-url")
    assert found["DRAWBRIDGE_REDIS_URL"] == ref("drawbridge-redis", "url")
    assert found["DRAWBRIDGE_OPERATOR_TOKEN"] == ref("drawbridge-operator", "token")
    (keys,) = [it["secret"] for it in server()["spec"]["volumes"] if it["name"] == "master-keys"]
    assert keys == {"secretName": "drawbridge-master-keys", "defaultMode": 0o440, "items": [{"key": "keys", "path": "keys"}]}


def test_files_that_are_named_are_mounted():
    template = server(CASES["everything"])
    mounts = [it["mountPath"] for it in container(template)["volumeMounts"]]
    for name in ("DRAWBRIDGE_MASTER_KEYS_FILE", "DRAWBRIDGE_CA_FILE"):
        assert env(template)[name].rpartition("/")[0] in mounts


@pytest.mark.parametrize("mode, expected", [("hook", "false"), ("start", "true"), ("none", "false")])
def test_replicas_migrate_only_where_told(mode, expected):
    assert env(server(merge(REQUIRED, {"migration": {"mode": mode}})))["DRAWBRIDGE_MIGRATE_ON_START"] == expected


@pytest.mark.parametrize("family, listen, told", [("IPv4", "0.0.0.0", "$(POD_IP)"), ("IPv6", "[::]", "[$(POD_IP)]")])
def test_listeners_ports_and_probes_agree(family, listen, told):
    template = server(merge(REQUIRED, {"ipFamily": family}))
    found, named = env(template), ports(template)
    assert found["DRAWBRIDGE_LISTEN"] == f"{listen}:{named['http']}"
    assert found["DRAWBRIDGE_INTERNAL_LISTEN"] == f"{told}:{named['peer']}"
    assert found["DRAWBRIDGE_ADMIN_LISTEN"] == f"{listen}:{named['admin']}"
    assert [it["name"] for it in container(template)["env"]].index("POD_IP") == 0, "must come before what refers to it"
    probes = {kind: container(template)[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")}
    assert probes == {
        "startup": {"path": "/readyz", "port": "admin"},
        "readiness": {"path": "/readyz", "port": "admin"},
        "liveness": {"path": "/livez", "port": "admin"},
    }


@pytest.mark.parametrize("case", CASES)
def test_selectors_find_the_replicas_and_not_the_jobs(case):
    objects = render(CASES[case])
    deployment = only(objects, "Deployment")
    selectors = [deployment["spec"]["selector"]["matchLabels"]]
    selectors += [it["spec"]["selector"] for it in of_kind(objects, "Service")]
    selectors += [it["spec"]["selector"]["matchLabels"] for it in of_kind(objects, "PodDisruptionBudget")]
    spread = deployment["spec"]["template"]["spec"].get("topologySpreadConstraints", [])
    selectors += [it["labelSelector"]["matchLabels"] for it in spread]
    for selector in selectors:
        for name, template in pods(objects).items():
            assert selects(selector, template) == (name == deployment["metadata"]["name"])


def test_the_selector_has_nothing_that_changes_between_versions():
    assert only(render(CASES["everything"]), "Deployment")["spec"]["selector"]["matchLabels"].keys() == {
        "app.kubernetes.io/name", "app.kubernetes.io/instance", "app.kubernetes.io/component",
    }


def test_services_lead_to_ports_that_exist():
    objects = render(CASES["everything"])
    services = {it["metadata"]["name"]: it for it in of_kind(objects, "Service")}
    for service in services.values():
        for port in service["spec"]["ports"]:
            assert port["name"] == port["targetPort"] and port["targetPort"] in ports(server())
    assert services["drawbridge-peers"]["spec"]["clusterIP"] == "None"
    assert services["drawbridge-peers"]["spec"]["publishNotReadyAddresses"] is True
    monitor = only(objects, "ServiceMonitor")["spec"]
    assert [name for name, it in services.items() if monitor["selector"]["matchLabels"].items() <= it["metadata"]["labels"].items()] == ["drawbridge-peers"]
    backend = only(objects, "Ingress")["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]
    assert backend == {"name": "drawbridge", "port": {"name": "http"}}


def test_the_network_policy_lets_in_what_services_need_and_out_what_replicas_need():
    given = {"networkPolicy": {"enabled": True, "postgresPorts": [5432, 6432]}, "redis": {"existingSecret": "redis"}}
    objects = render(merge(REQUIRED, given))
    (policy,) = [it["spec"] for it in of_kind(objects, "NetworkPolicy") if not it["metadata"].get("annotations")]
    own = policy["podSelector"]["matchLabels"]
    assert all(selects(own, template) for template in pods(objects).values())
    clients, admin, own_pods = policy["ingress"]
    assert clients == {"ports": [{"port": "http"}]}, "everybody, by default"
    assert admin == {"ports": [{"port": "admin"}], "from": [{"namespaceSelector": {}}]}
    # Replicas forward to each other, and the doctor asks them all.
    assert own_pods == {"from": [{"podSelector": {"matchLabels": own}}]}
    dns, stores, peers = policy["egress"]
    assert {(it["port"], it["protocol"]) for it in dns["ports"]} == {(53, "UDP"), (53, "TCP")}
    assert [it["port"] for it in stores["ports"]] == [5432, 6432, 443, 6379]
    assert peers == {"to": own_pods["from"]}


def test_the_network_policy_can_be_narrowed_and_widened():
    (policy,) = [it["spec"] for it in of_kind(render(CASES["everything"]), "NetworkPolicy") if not it["metadata"].get("annotations")]
    assert policy["ingress"][0]["from"] == [{"ipBlock": {"cidr": "10.0.0.0/8"}}]
    assert policy["ingress"][-1] == {"ports": [{"port": 1}]} and policy["egress"][-1] == {"ports": [{"port": 2}]}


@pytest.mark.parametrize("case", CASES)
def test_every_pod_is_restricted(case):
    objects = render(CASES[case])
    for template in pods(objects).values():
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] == 65532
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & spec.keys()
        assert all({"secret", "configMap"} & volume.keys() for volume in spec["volumes"])
        assert container(template)["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
        }
        assert not any("hostPort" in port for port in container(template).get("ports", []))
    for account in of_kind(objects, "ServiceAccount"):
        assert account["automountServiceAccountToken"] is False


def test_the_cluster_may_choose_the_user():
    ids = {"runAsUser": None, "runAsGroup": None, "fsGroup": None}
    context = server(merge(REQUIRED, {"podSecurityContext": ids}))["spec"]["securityContext"]
    assert context == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}


def test_a_replica_is_killed_only_after_it_could_have_ended_by_itself():
    def seconds(name, file):
        return int(re.search(rf"const {name}: Duration = Duration::from_secs\((\d+)\)", SOURCE[file])[1])

    # As in Server::until: told peers, drained, cancelled, wrote what was seen, wrote the log, ended the tasks, left.
    last = 2 * seconds("LAST_WORDS", "server") + 3 * seconds("FAREWELL", "server") + seconds("FLUSH_TIME", "ledger")
    for drain in ({"delaySeconds": 5, "graceSeconds": 600}, {"delaySeconds": 30, "graceSeconds": 1800}):
        spec = server(merge(REQUIRED, {"drain": drain}))["spec"]
        assert spec["terminationGracePeriodSeconds"] > sum(drain.values()) + last
    assert server(merge(REQUIRED, {"terminationGracePeriodSeconds": 900}))["spec"]["terminationGracePeriodSeconds"] == 900


def test_probes_wait_longer_than_the_program_waits_for_postgres():
    patience = re.search(r"timeout\(Duration::from_secs\((\d+)\), db", (ROOT / "src/server/health.rs").read_text())
    for kind in ("startup", "readiness"):
        assert container(server())[f"{kind}Probe"]["timeoutSeconds"] > int(patience[1])
