"""The manifests for KubeRay: rendered, held against schemas of stated releases, and against what our code takes.

The schemas beside this file are of KubeRay 1.7.0; those of core Kubernetes come with kubernetes-validate.
"""

import copy
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import ray
import yaml
from jsonschema import Draft202012Validator, ValidationError
from kubernetes_validate.utils import schema_contents
from ray._private.services import determine_plasma_store_config
from ray.serve.schema import ServeDeploySchema
from referencing import Registry, Resource
from typer.main import get_command

from workflows.cli import app
from workflows.recipe import Recipe, load_recipe
from workflows.serve.app import AppArgs
from workflows.serve.config import ServedModels

KUBERNETES = "1.37"
DEPLOY = Path(__file__).parents[3] / "deploy" / "kuberay"
SCHEMAS = Path(__file__).parent / "kuberay_schemas"
RENDERINGS = ("base", "overlays/cpu", "overlays/gpu-spot")
KNOWN = {"apiVersion", "kind", "namespace", "resources", "patches", "images"}
LOCKED = dict(
    allowPrivilegeEscalation=False, readOnlyRootFilesystem=True, runAsNonRoot=True, capabilities={"drop": ["ALL"]}
)
Document = dict[str, Any]


def load(path: Path) -> list[Document]:
    """Its documents, without the sharing that YAML's aliases would leave between their parts."""
    documents: list[Document] = json.loads(json.dumps(list(yaml.safe_load_all(path.read_text()))))
    return documents


def render(folder: Path) -> list[Document]:
    """What of kustomize the manifests use; anything else is refused, so that nothing is left out in silence."""
    (said,) = load(folder / "kustomization.yaml")
    assert set(said) <= KNOWN
    documents: list[Document] = []
    for name in said["resources"]:
        documents += render(folder / name) if (folder / name).is_dir() else load(folder / name)
    for patch in said.get("patches", []):
        _apply(patch, folder, documents)
    for document in documents:
        if document["kind"] != "Namespace" and "namespace" in said:
            document["metadata"]["namespace"] = said["namespace"]
        for image in said.get("images", []):
            _name_images(document, image)
    return documents


def _apply(patch: Document, folder: Path, documents: list[Document]) -> None:
    assert set(patch) <= {"path", "patch", "target"}
    (body,) = load(folder / patch["path"]) if "path" in patch else [yaml.safe_load(patch["patch"])]
    target = patch.get("target") or {"kind": body["kind"], "name": body["metadata"]["name"]}
    assert set(target) == {"kind", "name"}
    (found,) = [d for d in documents if _name_of(d) == (target["kind"], target["name"])]
    if isinstance(body, dict):
        _merge(found, body)
        return
    for change in copy.deepcopy(body):
        place, last = _within(found, change["path"][1:])
        assert isinstance(place, dict), "only fields of maps are patched"
        if change["op"] not in {"add", "replace"} or (change["op"] == "replace" and last not in place):
            raise AssertionError(f"cannot {change['op']} {change['path']}")
        place[last] = change["value"]


def _within(document: Document, path: str) -> tuple[Any, str]:
    """What holds a field, and the field's name. The path is a JSON pointer's, without the first slash."""
    *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in path.split("/")]
    place: Any = document
    for part in parents:
        place = place[int(part)] if isinstance(place, list) else place[part]
    return place, last


def _merge(into: Document, patch: Document) -> None:
    for key, value in patch.items():
        assert value is not None, "removal is not known to this renderer"
        assert not isinstance(value, list), "lists are merged by rules that this renderer does not know"
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _name_images(value: Any, image: dict[str, str]) -> None:
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _name_images(part, image)
    if isinstance(value, dict) and isinstance(value.get("image"), str):
        name = value["image"].partition(":")[0]
        if name == image["name"]:
            value["image"] = f"{image.get('newName', name)}:{image['newTag']}"


@cache
def _rendered(name: str) -> str:
    return json.dumps(render(DEPLOY / name))


@pytest.fixture(params=RENDERINGS)
def documents(request: pytest.FixtureRequest) -> list[Document]:
    rendered: list[Document] = json.loads(_rendered(request.param))
    return rendered


def the(documents: list[Document], kind: str, name: str) -> Document:
    (found,) = [d for d in documents if _name_of(d) == (kind, name)]
    return found


def clusters(documents: list[Document]) -> Iterator[tuple[str, Document]]:
    for document in documents:
        field = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}.get(document["kind"])
        spec = document["spec"] if document["kind"] == "RayCluster" else document.get("spec", {}).get(field)
        if spec is not None:
            yield f"{document['kind']}/{document['metadata']['name']}", spec


def templates(documents: list[Document]) -> Iterator[tuple[str, Document]]:
    for name, spec in clusters(documents):
        yield f"{name} head", spec["headGroupSpec"]["template"]
        for group in spec["workerGroupSpecs"]:
            yield f"{name} {group['groupName']}", group["template"]
    for document in documents:
        where = f"{document['kind']}/{document['metadata']['name']}"
        if document["kind"] == "RayJob":
            yield f"{where} submitter", document["spec"]["submitterPodTemplate"]
        if document["kind"] == "StatefulSet":
            yield where, document["spec"]["template"]


def containers(documents: list[Document]) -> Iterator[tuple[str, Document]]:
    for where, template in templates(documents):
        for container in template["spec"].get("initContainers", []) + template["spec"]["containers"]:
            yield f"{where} {container['name']}", container


def group_of(spec: Document, name: str) -> Document:
    (found,) = [group for group in spec["workerGroupSpecs"] if group["groupName"] == name]
    return found


def offered(group: Document, resource: str) -> float:
    """What a group has of a resource when it is as large as it gets."""
    (container,) = group["template"]["spec"]["containers"]
    return group["maxReplicas"] * float(container["resources"]["limits"].get(resource, 0))


def bytes_of(quantity: str) -> int:
    """Of a quantity as the manifests write it: `1Ti`, `64Gi`, `512Mi`."""
    number, unit = quantity[:-2], quantity[-2:]
    return int(number) << {"Mi": 20, "Gi": 30, "Ti": 40}[unit]


@cache
def validator_of(kind: str) -> Draft202012Validator:
    core = schema_contents(f"kubernetes-json-schema/v{KUBERNETES}.0-local-strict/_definitions.json", KUBERNETES)
    ours = [json.loads(path.read_text()) for path in sorted(SCHEMAS.glob("*.json"))]
    registry = Registry().with_resources((s["$id"], Resource.from_contents(s)) for s in [core, *ours])
    (schema,) = [s for s in ours if s["$id"] == f"urn:dllm:kuberay:{kind.lower()}"]
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema, registry=registry)


def check(document: Document) -> None:
    if document["apiVersion"].startswith("ray.io/"):
        validator_of(document["kind"]).validate(document)
    else:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


def test_every_document_is_what_its_schema_says(documents: list[Document]) -> None:
    for document in documents + load(DEPLOY / "secrets.example.yaml"):
        check(document)


def _name_of(document: Document) -> tuple[str, str]:
    return document["kind"], document["metadata"]["name"]


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl, which has kustomize within")
@pytest.mark.parametrize("name", RENDERINGS)
def test_kustomize_renders_the_same(name: str) -> None:
    asked = subprocess.run(["kubectl", "kustomize", str(DEPLOY / name)], capture_output=True, text=True, check=True)
    assert sorted(yaml.safe_load_all(asked.stdout), key=_name_of) == sorted(render(DEPLOY / name), key=_name_of)


GONE = object()
WORKERS = "spec/workerGroupSpecs/0"
POD = "template/spec/containers/0"
UPGRADE = "spec/upgradeStrategy"


@pytest.mark.parametrize(
    ("kind", "name", "path", "value"),
    [
        ("RayCluster", "dllm", f"{WORKERS}/replica", 1),
        ("RayCluster", "dllm", f"{WORKERS}/maxReplicas", "16"),
        ("RayCluster", "dllm", f"{WORKERS}/minReplicas", -1),
        ("RayCluster", "dllm", f"{WORKERS}/groupName", GONE),
        ("RayCluster", "dllm", f"{WORKERS}/labels", {"dllm stage": "preprocess"}),
        ("RayCluster", "dllm", f"{WORKERS}/rayStartParams", {"labels": "a=b"}),
        ("RayCluster", "dllm", f"{WORKERS}/template/spec/restartPolicy", "Always"),
        ("RayCluster", "dllm", f"{WORKERS}/{POD}/imagePulPolicy", "Always"),
        ("RayCluster", "dllm", f"{WORKERS}/template/spec/containers", []),
        ("RayCluster", "dllm", "spec/headGroupSpec", GONE),
        ("RayCluster", "dllm", "spec/headGroupSpec/rayStartParams/num-cpus", 0),
        ("RayCluster", "dllm", "spec/headGroupSpec/resources", {"CPU": "0"}),
        ("RayCluster", "dllm", "spec/autoscalerOptions/version", "V2"),
        ("RayCluster", "dllm", "spec/authOptions/mode", "tokens"),
        ("RayCluster", "dllm", "spec/rayVersion", "2.51.0"),
        ("RayCluster", "dllm", "spec/gcsFaultToleranceOptions/backend", "rocksdb"),
        ("RayCluster", "dllm", "metadata/name", "Dllm"),
        ("RayJob", "dllm-preprocess", "spec/backoffLimit", 3),
        ("RayJob", "dllm-preprocess", "spec/clusterSelector", GONE),
        ("RayJob", "dllm-preprocess", "spec/ttlSecondsAfterFinished", 60),
        ("RayJob", "dllm-train", "spec/submissionMode", "K8SJobMode"),
        ("RayJob", "dllm-train", "spec/rayClusterSpec/headGroupSpec", GONE),
        ("RayJob", "dllm-train", "metadata/name", "t" * 48),
        ("RayService", "dllm-endpoint", f"{UPGRADE}/type", "IncrementalUpgrade"),
        ("RayService", "dllm-endpoint", f"{UPGRADE}/clusterUpgradeOptions", GONE),
        ("RayService", "dllm-endpoint", f"{UPGRADE}/clusterUpgradeOptions/stepSizePercent", 101),
        ("RayService", "dllm-endpoint", "spec/rayClusterConfig/enableInTreeAutoscaling", False),
        ("RayService", "dllm-endpoint", "spec/rayClusterConfig", GONE),
        ("StatefulSet", "dllm-redis", f"spec/{POD}/securityContext/runAsNonroot", True),
        ("NetworkPolicy", "ray", "spec/podSelectors", {}),
    ],
)
def test_a_planted_error_is_refused(kind: str, name: str, path: str, value: Any) -> None:
    document = the(json.loads(_rendered("base")), kind, name)
    check(document)
    place, last = _within(document, path)
    place[last] = value
    if value is GONE:
        del place[last]
    with pytest.raises((ValidationError, kubernetes_validate.ValidationError)):
        check(document)


def test_every_container_is_locked_and_bounded(documents: list[Document]) -> None:
    for where, template in templates(documents):
        person = template["spec"]["securityContext"]
        assert person["runAsUser"] > 0, where
        assert person["runAsNonRoot"] is True, where
        assert person["seccompProfile"] == {"type": "RuntimeDefault"}, where
        asks_kubernetes = template["spec"].get("automountServiceAccountToken", True)
        assert asks_kubernetes == (template["spec"]["serviceAccountName"] == "dllm-head"), where
    sidecars = [(f"{name} autoscaler", spec["autoscalerOptions"]) for name, spec in clusters(documents)]
    for where, container in [*containers(documents), *sidecars]:
        assert container["securityContext"] == LOCKED, where
        for bound in ("requests", "limits"):
            assert {"cpu", "memory", "ephemeral-storage"} <= set(container["resources"][bound]), f"{where} {bound}"
        assert "/tmp" in {mount["mountPath"] for mount in container["volumeMounts"]}, where
    for where, container in containers(documents):
        assert re.fullmatch(r"[\w.-]+(/[\w.-]+)+:\d+\.\d+\.\d+(-cpu)?", container["image"]), where


def test_objects_of_ray_find_room_in_shared_memory(documents: list[Document], monkeypatch: pytest.MonkeyPatch) -> None:
    """By Ray's own rule: where 30 % of a container's memory is more than its /dev/shm has, objects lie on the disk."""
    for where, template in templates(documents):
        (container,) = template["spec"]["containers"]
        shared = [v["emptyDir"]["sizeLimit"] for v in template["spec"].get("volumes", []) if v["name"] == "shm"]
        if not shared:
            assert not container["name"].startswith(("ray-head", "ray-worker")), where
            continue
        memory, room = bytes_of(container["resources"]["limits"]["memory"]), bytes_of(shared[0])
        monkeypatch.setattr(ray._private.utils, "get_shared_memory_bytes", lambda room=room: room)
        monkeypatch.setattr(ray._common.utils, "get_system_memory", lambda memory=memory: memory)
        wanted = ray._private.utils.resolve_object_store_memory(memory)
        assert determine_plasma_store_config(wanted, "/tmp")[0] == "/dev/shm", where


def test_the_cache_of_shards_fills_its_claim_and_stays_within(documents: list[Document]) -> None:
    claims = {
        d["metadata"]["name"]: d["spec"]["resources"]["requests"]["storage"] for d in documents if "Claim" in d["kind"]
    }
    limits = []
    for where, template in templates(documents):
        for volume in template["spec"].get("volumes", []):
            if "persistentVolumeClaim" in volume:
                (container,) = template["spec"]["containers"]
                said = {one["name"]: one["value"] for one in container["env"]}
                room = bytes_of(claims[volume["persistentVolumeClaim"]["claimName"]])
                assert 0.7 * room <= int(said["DLLM_CACHE_BYTES"]) <= 0.9 * room, where
                limits.append(where)
    assert len(limits) == 3


def test_what_pods_name_is_there(documents: list[Document]) -> None:
    there = {_name_of(d) for d in documents + load(DEPLOY / "secrets.example.yaml")}
    claimed = {"data"}  # of the StatefulSet's own
    for where, template in templates(documents):
        spec = template["spec"]
        volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
        named = {("ServiceAccount", spec["serviceAccountName"])}
        for volume in volumes.values():
            named |= {("ConfigMap", volume["configMap"]["name"])} if "configMap" in volume else set()
            named |= {("Secret", volume["secret"]["secretName"])} if "secret" in volume else set()
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            named |= {("PersistentVolumeClaim", claim)} if claim else set()
        (container,) = spec["containers"]
        named |= {("Secret", source["secretRef"]["name"]) for source in container.get("envFrom", [])}
        assert named <= there, where
        assert {mount["name"] for mount in container["volumeMounts"]} <= set(volumes) | claimed, where
        if "nvidia.com/gpu" in container["resources"]["limits"]:
            assert volumes["shm"]["emptyDir"]["medium"] == "Memory", where
            assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"], where


def test_secrets_are_examples_and_nothing_else(documents: list[Document]) -> None:
    assert not [d for d in documents if d["kind"] == "Secret"]
    keys = {d["metadata"]["name"]: set(d["stringData"]) for d in load(DEPLOY / "secrets.example.yaml")}
    told = re.findall(r'"secretKeyRef": (\{.*?\})', json.dumps(documents))
    assert told
    for ref in map(json.loads, told):
        assert ref["key"] in keys[ref["name"]]
    assert keys["dllm-ray-auth"] == {"auth_token"}  # the key that KubeRay reads


def test_every_node_tells_how_full_its_disk_is(documents: list[Document]) -> None:
    """Ray tells of one byte that is free else, and the alert of disks that are nearly full never fires."""
    nodes = [(where, one) for where, one in containers(documents) if one["name"] in ("ray-head", "ray-worker")]
    assert len(nodes) == 8
    for where, container in nodes:
        assert {"name": "RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE", "value": "1"} in container["env"], where


def test_every_ray_container_has_the_token_and_heads_run_no_work(documents: list[Document]) -> None:
    found = list(clusters(documents))
    assert len(found) == 3
    for name, spec in found:
        # The operator gives the Secret's token to all containers of such a cluster, and of its submitter.
        assert spec["authOptions"] == {"mode": "token", "secretName": "dllm-ray-auth"}, name
        assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0", name
        assert spec["autoscalerOptions"]["version"] == "v2", name
        assert spec["enableInTreeAutoscaling"] is True, name
        assert all(group["labels"] == {"dllm-stage": group["groupName"]} for group in spec["workerGroupSpecs"]), name
        for group in spec["workerGroupSpecs"]:
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"], name
    addresses = {name: spec.get("gcsFaultToleranceOptions", {}).get("redisAddress") for name, spec in found}
    redis = "dllm-redis:6379"
    assert addresses == {"RayCluster/dllm": redis, "RayJob/dllm-train": None, "RayService/dllm-endpoint": redis}


def _selects(selector: Document, labels: dict[str, str]) -> bool:
    for wanted in selector.get("matchExpressions", []):
        if wanted["operator"] == "Exists":
            if wanted["key"] not in labels:
                return False
            continue
        assert wanted["operator"] == "In"
        if labels.get(wanted["key"]) not in wanted["values"]:
            return False
    return selector.get("matchLabels", {}).items() <= labels.items()


def test_selectors_find_pods(documents: list[Document]) -> None:
    labels = [template["metadata"]["labels"] for _, template in templates(documents)]
    selectors = []
    for document in documents:
        spec = document.get("spec", {})
        if document["kind"] == "Service":
            selectors.append({"matchLabels": spec["selector"]})
        if document["kind"] in {"PodDisruptionBudget", "StatefulSet"}:
            selectors.append(spec["selector"])
        if document["kind"] == "NetworkPolicy":
            peers = [p for rule in spec.get("ingress", []) for p in rule.get("from", [])]
            peers += [p for rule in spec.get("egress", []) for p in rule.get("to", [])]
            selectors += [spec["podSelector"], *(p["podSelector"] for p in peers if "namespaceSelector" not in p)]
    assert len(selectors) > 10
    for selector in selectors:
        made_for = any("gateway-name" in e["key"] for e in selector.get("matchExpressions", []))
        assert made_for or any(_selects(selector, of_pod) for of_pod in labels), selector
    for value in {value for s in selectors for e in s.get("matchExpressions", []) for value in e.get("values", [])}:
        assert value in {of_pod["app.kubernetes.io/component"] for of_pod in labels}
    selector = the(documents, "RayJob", "dllm-preprocess")["spec"]["clusterSelector"]
    assert the(documents, "RayCluster", selector["ray.io/cluster"])


def test_only_the_endpoint_is_open_to_all(documents: list[Document]) -> None:
    policies = {d["metadata"]["name"]: d["spec"] for d in documents if d["kind"] == "NetworkPolicy"}
    assert policies["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    rules = [(name, rule) for name, spec in policies.items() for rule in spec.get("ingress", [])]
    assert [(name, rule["ports"]) for name, rule in rules if not rule.get("from")] == [
        ("endpoint", [{"protocol": "TCP", "port": 8000}]),
        ("gateway", [{"protocol": "TCP", "port": 80}]),
    ]


def test_the_proxies_of_a_gateway_reach_the_endpoint_and_their_control_plane(documents: list[Document]) -> None:
    """Gateway API implementations run them in the Gateway's namespace, where `default-deny` would cut them off."""
    proxy = {"gateway.networking.k8s.io/gateway-name": "dllm-endpoint-gateway"}
    policies = [
        d["spec"] for d in documents if d["kind"] == "NetworkPolicy" and _selects(d["spec"]["podSelector"], proxy)
    ]
    rules = [rule for spec in policies for rule in spec.get("egress", [])]
    pods = [template["metadata"]["labels"] for _, template in templates(documents)]
    served = [labels for labels in pods if labels["app.kubernetes.io/component"] == "serve"]
    reached = [
        rule["ports"]
        for rule in rules
        for peer in rule["to"]
        if "namespaceSelector" not in peer and any(_selects(peer["podSelector"], labels) for labels in served)
    ]
    assert reached == [[{"protocol": "TCP", "port": 8000}]]
    assert 15012 in [port["port"] for rule in rules for port in rule["ports"]]


# What the project's own code takes.


def _recipe_of(documents: list[Document], job: str, verb: str, folder: Path) -> Recipe:
    """As the entrypoint of a job reads it."""
    program, said, path, *overrides = shlex.split(the(documents, "RayJob", job)["spec"]["entrypoint"])
    assert (program, said, path) == ("dllm", verb, "/recipes/recipe.yaml")
    assert verb in get_command(app).commands  # type: ignore[attr-defined]
    file = folder / "recipe.yaml"
    file.write_text(the(documents, "ConfigMap", "dllm-recipe")["data"]["recipe.yaml"])
    return load_recipe(file, overrides)


def test_jobs_run_verbs_on_a_recipe_that_the_workers_can_hold(documents: list[Document], tmp_path: Path) -> None:
    preprocess = _recipe_of(documents, "dllm-preprocess", "preprocess", tmp_path).placement.preprocess
    train = _recipe_of(documents, "dllm-train", "train", tmp_path).placement.train
    group = group_of(the(documents, "RayCluster", "dllm")["spec"], "preprocess")
    assert (preprocess.labels, preprocess.workers <= offered(group, "cpu")) == (group["labels"], True)
    group = group_of(the(documents, "RayJob", "dllm-train")["spec"]["rayClusterSpec"], "train")
    assert train.labels == group["labels"]
    assert train.workers * train.gpus_per_worker <= offered(group, "nvidia.com/gpu")
    assert train.workers * train.cpus_per_worker <= offered(group, "cpu")


def test_the_endpoint_is_one_that_ray_serve_and_our_builder_take(documents: list[Document]) -> None:
    spec = the(documents, "RayService", "dllm-endpoint")["spec"]
    deployed = ServeDeploySchema.model_validate(yaml.safe_load(spec["serveConfigV2"]))
    (application,) = deployed.applications
    assert application.import_path == "workflows.serve.app:build"
    args = AppArgs.model_validate(application.args)
    http = deployed.http_options
    assert (http.host, http.port) == ("0.0.0.0", 8000)
    assert (http.request_timeout_s or 0) > args.serve.request_timeout_s
    assert args.serve.keys_file == "/keys/keys"
    assert not args.models  # others there would restart all
    said = [ServedModels.of(one.user_config) for one in application.deployments]
    assert {one.name for one in application.deployments} == {"DecodeReplica", "Gateway"}
    assert said[0] == said[1] != {}
    assert all(model.run.startswith("s3://") for model in said[0].values())
    group = group_of(spec["rayClusterConfig"], "serve")
    assert args.placement.labels == group["labels"]
    assert args.placement.max_replicas * args.placement.gpus_per_replica <= offered(group, "nvidia.com/gpu")
    assert args.placement.max_replicas * args.placement.cpus_per_replica <= offered(group, "cpu")
    options = spec["upgradeStrategy"].get("clusterUpgradeOptions", {"stepSizePercent": 0, "maxSurgePercent": 0})
    assert options["stepSizePercent"] <= options["maxSurgePercent"]  # the operator asks for it; a schema cannot


def test_overlays_do_what_they_are_for() -> None:
    base, small, spot = (_rendered(name) for name in RENDERINGS)
    assert '"nvidia.com/gpu": "1"' in base
    assert '"nvidia.com/gpu": "1"' not in small
    images = {container["image"] for _, container in containers(json.loads(small))}
    assert {image for image in images if "dllm" in image and not image.endswith("-cpu")} == set()
    spot_groups = {where: template["spec"].get("nodeSelector") for where, template in templates(json.loads(spot))}
    assert {where for where, nodes in spot_groups.items() if nodes} == {"RayCluster/dllm preprocess"}
