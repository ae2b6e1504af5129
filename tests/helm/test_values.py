"""Values: documented, checked, and refused with a text that helps."""

import json

import helm_python
import pytest
import yaml

import readme
from chart import CHART, PRESETS, REQUIRED, merge, render_texts

VALUES = yaml.safe_load((CHART / "values.yaml").read_text())


@pytest.mark.parametrize("values, said", [
    # Misspelt, of the wrong type, out of range: the schema.
    ({"replica": 3}, "additional properties 'replica' not allowed"),
    ({"settings": {"snapshot": "full"}}, "additional properties 'snapshot' not allowed"),
    ({"settings": {"snapshots": "some"}}, "at '/settings/snapshots': value must be one of 'auto', 'full', 'off'"),
    ({"settings": {"routing": "random"}}, "at '/settings/routing'"),
    ({"settings": {"upstreamTransport": "http3"}}, "at '/settings/upstreamTransport'"),
    ({"settings": {"upstreamUrl": "chatgpt.com"}}, "at '/settings/upstreamUrl'"),
    ({"settings": {"usagePoll": "often"}}, "at '/settings/usagePoll'"),
    ({"settings": {"maxSessions": 0}}, "at '/settings/maxSessions': minimum: got 0, want 1"),
    ({"settings": {"maxSessions": "many"}}, "at '/settings/maxSessions': got string, want integer"),
    ({"settings": {"retentionDays": 0}}, "at '/settings/retentionDays'"),
    ({"settings": {"planWeights": {"pro": "big"}}}, "at '/settings/planWeights/pro'"),
    ({"settings": {"planWeights": {"pro=1,free": 2}}}, "at '/settings/planWeights'"),
    ({"settings": {"modelAliases": {"fast": "a,b"}}}, "at '/settings/modelAliases/fast'"),
    ({"settings": {"logFormat": "xml"}}, "at '/settings/logFormat'"),
    ({"settings": {"hideQuota": "yes"}}, "at '/settings/hideQuota': got string, want boolean"),
    ({"replicas": 0}, "at '/replicas': minimum: got 0, want 1"),
    ({"drain": {"graceSeconds": "10m"}}, "at '/drain/graceSeconds': got string, want integer"),
    ({"drain": {"delaySeconds": -1}}, "at '/drain/delaySeconds'"),
    ({"image": {"repository": "Bad Name"}}, "at '/image/repository'"),
    ({"image": {"digest": "latest"}}, "at '/image/digest'"),
    ({"image": {"pullPolicy": "Sometimes"}}, "at '/image/pullPolicy'"),
    ({"database": {"url": "postgres://u:p@h/db"}}, "at '/database': additional properties 'url' not allowed"),
    ({"database": {"existingSecret": "Not_A_Name"}}, "at '/database/existingSecret'"),
    ({"service": {"port": 70000}}, "at '/service/port': maximum: got 70,000, want 65,535"),
    ({"service": {"type": "ExternalName"}}, "at '/service/type'"),
    ({"ipFamily": "both"}, "at '/ipFamily'"),
    ({"ingress": {"controller": "apache"}}, "at '/ingress/controller'"),
    ({"ingress": {"host": "https://a.example.com/"}}, "at '/ingress/host'"),
    ({"doctor": {"through": "drawbridge.example.com"}}, "at '/doctor/through'"),
    ({"migration": {"mode": "sometimes"}}, "at '/migration/mode': value must be one of 'hook', 'start', 'none'"),
    ({"networkPolicy": {"postgresPorts": ["postgres"]}}, "at '/networkPolicy/postgresPorts/0'"),
    ({"networkPolicy": {"clients": [{}]}}, "at '/networkPolicy/clients/0'"),
    ({"networkPolicy": {"clients": [{"namespace": "x"}]}}, "additional properties 'namespace' not allowed"),
    ({"podSecurityContext": {"runAsUser": 0}}, "at '/podSecurityContext/runAsUser': minimum: got 0, want 1"),
    ({"podSecurityContext": {"runAsNonRoot": False}}, "additional properties 'runAsNonRoot' not allowed"),
    ({"podDisruptionBudget": {"maxUnavailable": 0}}, "at '/podDisruptionBudget/maxUnavailable'"),
    ({"spread": {"nodes": "always"}}, "at '/spread/nodes'"),
    ({"proxy": {"https": "http://u:p@proxy"}}, "at '/proxy/https'"),
    ({"resources": {"limits": {"memory": "lots"}}}, "at '/resources/limits/memory'"),
    ({"extraEnv": [{"value": "x"}]}, "at '/extraEnv/0': missing property 'name'"),
    ({"podLabels": {"a": "not a label"}}, "at '/podLabels/a'"),
    ({"fullnameOverride": "n" * 51}, "at '/fullnameOverride'"),
    # Missing, or not fitting together: templates/checks.yaml.
    ({"image": {"repository": ""}}, "image.repository is empty: build the image from deploy/Dockerfile"),
    ({"database": {"existingSecret": ""}}, "kubectl create secret generic --namespace codex drawbridge-database --from-literal=url="),
    ({"masterKeys": {"existingSecret": ""}}, 'drawbridge-master-keys --from-literal=keys="k1:$(openssl rand -base64 32)"'),
    ({"terminationGracePeriodSeconds": 600}, "terminationGracePeriodSeconds is 600, but draining takes up to 645 s"),
    ({"terminationGracePeriodSeconds": 645, "drain": {"graceSeconds": 1200}}, "draining takes up to 1245 s"),
    ({"autoscaling": {"enabled": True, "minReplicas": 4, "maxReplicas": 3}}, "maxReplicas is less than autoscaling.minReplicas"),
    ({"autoscaling": {"enabled": True}, "resources": {"requests": {"cpu": None}}}, "autoscaling needs resources.requests.cpu"),
    ({"ingress": {"enabled": True}}, "ingress.host is empty"),
    ({"httpRoute": {"enabled": True}}, "httpRoute.parentRefs is empty"),
    ({"extraEnv": [{"name": "DRAWBRIDGE_LISTEN", "value": "127.0.0.1:1"}]}, "extraEnv: DRAWBRIDGE_LISTEN is a setting of the program"),
])
def test_nonsense_is_refused_with_a_clear_text(values, said):
    with pytest.raises(helm_python.HelmError) as refused:
        render_texts(merge(REQUIRED, values))
    assert said in str(refused.value)


def test_all_that_is_missing_is_named_at_once():
    with pytest.raises(helm_python.HelmError) as refused:
        render_texts({})
    for name in ("image.repository", "database.existingSecret", "masterKeys.existingSecret"):
        assert f"{name} is empty" in str(refused.value)


def leaves(values, path=""):
    for key, value in values.items():
        yield from leaves(value, f"{path}{key}.") if isinstance(value, dict) and value else [f"{path}{key}"]


def test_every_value_is_documented():
    documented = [path for path, _, _ in readme.rows()]
    assert len(documented) == len(set(documented))
    for leaf in leaves(VALUES):
        assert any(leaf == path or leaf.startswith(f"{path}.") for path in documented), leaf


def test_the_readme_is_current():
    assert readme.README.read_text() == readme.current(), "run: .tools/helm/bin/python tests/helm/readme.py"


def test_the_schema_knows_exactly_the_values_that_there_are():
    def compare(properties, values, path):
        assert properties.keys() - {"global"} == values.keys(), path
        for key, schema in properties.items():
            if "properties" in schema and key not in ("resources", "podSecurityContext"):
                compare(schema["properties"], values[key], f"{path}{key}.")

    schema = json.loads((CHART / "values.schema.json").read_text())
    compare(schema["properties"], VALUES, "")


def test_presets_are_explained_and_named_in_the_readme():
    for name in PRESETS:
        assert (CHART / f"presets/{name}.yaml").read_text().startswith("# ")
        assert f"presets/{name}.yaml" in readme.README.read_text()
