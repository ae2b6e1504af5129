"""What is rendered is what Kubernetes takes, under every preset, version and name."""

import functools
import re
import tomllib

import helm_python
import kubernetes_validate
import pytest
import yaml
from kubernetes_validate import utils

from chart import CASES, CHART, EVERYTHING, REQUIRED, ROOT, container, merge, of_kind, only, pods, render, render_texts

#: The oldest that Chart.yaml admits, one in between, the newest known.
VERSIONS = ["1.30", "1.33", kubernetes_validate.latest_version()]
#: Not of Kubernetes itself: kind -> required members of its spec.
CUSTOM = {"ServiceMonitor": {"selector", "endpoints"}, "PrometheusRule": {"groups"}, "HTTPRoute": {"parentRefs", "rules"}}

# It reads megabytes of definitions for each object.
utils.schema_contents = functools.cache(utils.schema_contents)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("case", CASES)
def test_kubernetes_takes_every_object(case, version):
    for it in render(CASES[case]):
        if it["kind"] not in CUSTOM:
            kubernetes_validate.validate(it, version, strict=True)


def test_the_oldest_version_is_the_one_that_the_chart_admits():
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["kubeVersion"] == f">={VERSIONS[0]}.0-0"


def test_custom_objects_have_their_shape():
    objects = render(CASES["everything"])
    for kind, members in CUSTOM.items():
        assert members <= only(objects, kind)["spec"].keys()
    monitor = only(objects, "ServiceMonitor")["spec"]
    assert monitor["endpoints"] == [{"port": "admin", "path": "/metrics", "interval": "30s"}]
    (rule,) = only(objects, "HTTPRoute")["spec"]["rules"]
    assert rule["timeouts"] == {"request": "0s", "backendRequest": "0s"}
    assert rule["backendRefs"] == [{"name": "drawbridge", "port": 2455}]


def test_rules_and_dashboards_come_through_unharmed():
    objects = render(CASES["everything"])
    assert only(objects, "PrometheusRule")["spec"] == yaml.safe_load((ROOT / "deploy/prometheus/rules.yaml").read_text())
    boards = {key: text for it in of_kind(objects, "ConfigMap") for key, text in it["data"].items()}
    sources = {path.name: path.read_text().strip() for path in (ROOT / "deploy/grafana").glob("*.json")}
    assert boards == sources and sources


def test_the_archive_has_the_files_that_the_chart_links_to(tmp_path):
    archive = helm_python.package(CHART, destination=tmp_path)
    with helm_python.Chart.load(archive) as chart:
        names = {file["name"] for file in chart.files}
    assert "files/rules.yaml" in names
    assert {name for name in names if name.startswith("files/grafana/")} == {
        f"files/grafana/{path.name}" for path in (ROOT / "deploy/grafana").glob("*.json")
    }


def test_helm_has_nothing_to_say():
    report = helm_python.lint(CHART, CASES["everything"], strict=True)
    said = [message for message in report["messages"] if "icon is recommended" not in message["error"]]
    assert (said, report["errors"]) == ([], [])


def test_the_chart_is_for_this_version_of_the_program():
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    cargo = tomllib.loads((ROOT / "Cargo.toml").read_text())
    assert chart["appVersion"] == cargo["workspace"]["package"]["version"]
    assert container(pods(render(REQUIRED))["drawbridge"])["image"].endswith(f":{chart['appVersion']}")


@pytest.mark.parametrize("name", ["x", "drawbridge", "team-drawbridge", "a" * 53, "drawbridge-" + "b" * 42])
def test_names_fit_whatever_the_release_is_called(name):
    for it in render(CASES["everything"], name):
        # ConfigMaps alone may be called by 253 characters: dashboards have names of their own.
        rest = 251 if it["kind"] == "ConfigMap" else 61
        assert re.fullmatch(rf"[a-z]([-a-z0-9]{{0,{rest}}}[a-z0-9])?", it["metadata"]["name"]), it["metadata"]["name"]


def test_a_name_is_used_once_for_each_kind():
    names = [(it["kind"], it["metadata"]["name"]) for it in render(CASES["everything"])]
    assert len(names) == len(set(names))


def test_no_secret_is_made_and_no_cluster_asked():
    for case in CASES.values():
        assert not of_kind(render(case), "Secret")
    for path in (CHART / "templates").iterdir():
        assert "lookup" not in path.read_text(), path


def test_the_migration_runs_before_everything_and_stays_when_it_fails():
    objects = render(merge(REQUIRED, {"networkPolicy": {"enabled": True}}))
    (job,) = [it for it in of_kind(objects, "Job") if it["metadata"]["name"].endswith("-migrate")]
    hook = {"helm.sh/hook": "pre-install,pre-upgrade", "helm.sh/hook-delete-policy": "before-hook-creation,hook-succeeded"}
    assert job["metadata"]["annotations"] == hook
    # What it needs exists before it, and nothing that it needs is made by the release proper.
    (policy,) = [it for it in of_kind(objects, "NetworkPolicy") if it["metadata"]["name"].endswith("-migrate")]
    assert policy["metadata"]["annotations"] == hook | {"helm.sh/hook-weight": "-10"}
    assert "serviceAccountName" not in job["spec"]["template"]["spec"]
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= job["spec"]["template"]["metadata"]["labels"].items()


def test_without_hooks_there_is_none():
    assert not [it for it in render(CASES["preset gitops"]) if "helm.sh/hook" in str(it["metadata"].get("annotations"))]


def test_an_existing_account_is_used_and_none_made():
    objects = render(merge(REQUIRED, {"serviceAccount": {"name": "mine"}}))
    assert not of_kind(objects, "ServiceAccount")
    assert {template["spec"]["serviceAccountName"] for template in pods(objects).values()} == {"mine"}


def test_the_number_of_replicas_is_the_autoscalers_where_there_is_one():
    assert only(render(REQUIRED), "Deployment")["spec"]["replicas"] == 3
    objects = render(merge(REQUIRED, {"autoscaling": {"enabled": True}}))
    assert "replicas" not in only(objects, "Deployment")["spec"]
    assert only(objects, "HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]["name"] == only(objects, "Deployment")["metadata"]["name"]


def test_an_update_takes_nothing_away_first():
    strategy = only(render(REQUIRED), "Deployment")["spec"]["strategy"]
    assert strategy == {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}}


def test_annotations_of_the_ingress_can_be_replaced():
    given = {"nginx.ingress.kubernetes.io/proxy-body-size": "8m"}
    ingress = {"enabled": True, "host": "a.example.com", "annotations": given}
    found = only(render(merge(REQUIRED, {"ingress": ingress})), "Ingress")["metadata"]["annotations"]
    assert found["nginx.ingress.kubernetes.io/proxy-body-size"] == "8m"
    assert found["nginx.ingress.kubernetes.io/proxy-buffering"] == "off"
    assert found["nginx.ingress.kubernetes.io/proxy-buffer-size"] == "64k"
    other = only(render(merge(REQUIRED, {"ingress": ingress | {"controller": "other"}})), "Ingress")
    assert other["metadata"]["annotations"] == given


@pytest.mark.parametrize("values, said", [
    ({"ingress": {"enabled": True, "host": "a.example.com", "tlsSecret": "tls"}}, 'base_url = "https://a.example.com/backend-api/codex"'),
    ({"ingress": {"enabled": True, "host": "a.example.com"}}, "no certificate"),
    ({"service": {"type": "LoadBalancer"}}, "without TLS"),
    ({"replicas": 1}, "With one replica"),
    ({"migration": {"mode": "none"}}, "drawbridge migrate"),
    ({}, 'base_url = "http://drawbridge.codex.svc:2455/backend-api/codex"'),
])
def test_the_notes_say_what_to_do(values, said):
    assert said in render_texts(merge(REQUIRED, values))["NOTES.txt"]
