"""Renders the chart as Helm does, and finds things in what comes out."""

import functools
import json
from pathlib import Path

import helm_python
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm/drawbridge"
PRESETS = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((CHART / "presets").glob("*.yaml"))}

#: What nobody else can know.
REQUIRED = {
    "image": {"repository": "registry.example.com/drawbridge"},
    "database": {"existingSecret": "drawbridge-database"},
    "masterKeys": {"existingSecret": "drawbridge-master-keys"},
}
#: Every optional object and branch.
EVERYTHING = {
    "image": {"digest": "sha256:" + "0" * 64},
    "imagePullSecrets": [{"name": "registry"}],
    "autoscaling": {"enabled": True},
    "database": {"directUrlKey": "direct-url"},
    "redis": {"existingSecret": "drawbridge-redis"},
    "operatorToken": {"existingSecret": "drawbridge-operator"},
    "ca": {"existingConfigMap": "roots"},
    "settings": {"planWeights": {"pro": 6.67, "free": 0.15}, "modelAliases": {"fast": "gpt-5.4-mini"}, "hideQuota": True, "metricsAccounts": True, "turnsPerAccount": 2},
    "proxy": {"https": "http://proxy:3128", "noProxy": "10.0.0.0/8"},
    "terminationGracePeriodSeconds": 3600,
    "service": {"annotations": {"a": "b"}},
    "ipFamily": "IPv6",
    "ingress": {"enabled": True, "className": "nginx", "host": "drawbridge.example.com", "tlsSecret": "tls", "annotations": {"a": "b"}},
    "httpRoute": {"enabled": True, "parentRefs": [{"name": "gateway"}], "hostnames": ["drawbridge.example.com"]},
    "networkPolicy": {
        "enabled": True,
        "clients": [{"ipBlock": {"cidr": "10.0.0.0/8"}}],
        "extraIngress": [{"ports": [{"port": 1}]}],
        "extraEgress": [{"ports": [{"port": 2}]}],
    },
    "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "prometheusRule": {"enabled": True, "labels": {"release": "prometheus"}},
    "dashboards": {"enabled": True, "annotations": {"grafana_folder": "Drawbridge"}},
    "doctor": {"through": "https://drawbridge.example.com", "existingSecret": "drawbridge-doctor"},
    "affinity": {"nodeAffinity": {}},
    "nodeSelector": {"disk": "ssd"},
    "tolerations": [{"key": "gpu", "operator": "Exists"}],
    "priorityClassName": "high",
    "podAnnotations": {"a": "b"},
    # The second must not free the pods from the selectors.
    "podLabels": {"team": "tools", "app.kubernetes.io/name": "other"},
    "serviceAccount": {"annotations": {"a": "b"}},
    "extraEnv": [{"name": "SSL_CERT_FILE", "value": "/etc/drawbridge/ca/ca.crt"}],
    "extraVolumes": [{"name": "client", "secret": {"secretName": "client"}}],
    "extraVolumeMounts": [{"name": "client", "mountPath": "/etc/client"}],
}


def merge(*layers):
    """Later layers win, as with several -f."""
    out = {}
    for layer in layers:
        for key, value in layer.items():
            out[key] = merge(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


#: name -> values that are complete.
CASES = {
    "defaults": REQUIRED,
    "everything": merge(REQUIRED, EVERYTHING),
    **{f"preset {name}": merge(REQUIRED, values) for name, values in PRESETS.items()},
}


class Strict(yaml.SafeLoader):
    """Refuses a key that is given twice, as Kubernetes does."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"a key is given twice: {keys}"
        return super().construct_mapping(node, deep)


@functools.cache
def loaded():
    return helm_python.Chart.load(CHART)


def render_texts(values, name="drawbridge", namespace="codex"):
    """File of the template -> text."""
    loaded().validate_schema(values)
    return {Path(path).name: text for path, text in loaded().render(values, name=name, namespace=namespace).items()}


@functools.cache
def _objects(values, name):
    texts = render_texts(json.loads(values), name)
    return [it for file, text in texts.items() if file != "NOTES.txt" for it in yaml.load_all(text, Strict) if it]


def render(values, name="drawbridge"):
    """All objects, hooks included. Not to be changed."""
    return _objects(json.dumps(values, sort_keys=True), name)


def of_kind(objects, kind):
    return [it for it in objects if it["kind"] == kind]


def only(objects, kind):
    (found,) = of_kind(objects, kind)
    return found


def pods(objects):
    """Name of the object -> its pod template."""
    return {it["metadata"]["name"]: it["spec"]["template"] for it in objects if it["kind"] in ("Deployment", "Job")}


def container(template):
    (found,) = template["spec"]["containers"]
    return found


def env(template):
    """Name -> value, or where it comes from. No name twice."""
    entries = container(template)["env"]
    found = {it["name"]: it.get("value", it.get("valueFrom")) for it in entries}
    assert len(found) == len(entries)
    return found


def selects(selector, template):
    return selector.items() <= template["metadata"]["labels"].items()
