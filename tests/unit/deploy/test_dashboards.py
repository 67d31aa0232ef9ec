"""Dashboards and alert rules: they name only metrics and labels that are exported, show all of ours, and hold together.

What PromQL means is left to promtool, where it is installed; what it names is read here.
"""

import copy
import itertools
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from typer.main import get_command

from workflows import exported
from workflows.cli import app
from workflows.cli_cluster import _ACTIONS
from workflows.recipe import Recipe
from workflows.serve.metrics import GatewayMetrics

FOLDER = Path(__file__).parents[3] / "deploy" / "dashboards"
NAMES = ("preprocessing", "training", "serving")
RAY = Path(ray.__file__).parent
RAYS_METRICS = {
    "ray_cluster_active_nodes",
    "ray_cluster_pending_nodes",
    "ray_node_cpu_count",
    "ray_node_cpu_utilization",
    "ray_node_disk_free",
    "ray_node_disk_usage",
    "ray_node_gpus_utilization",
    "ray_node_gram_used",
    "ray_node_mem_total",
    "ray_node_mem_used",
    "ray_tasks",
}
RAYS_LABELS = {"GpuIndex", "SessionName", "State", "ip", "node_type"}
GIVEN_LABELS = {"rests"}  # to a target, in prometheus.yaml
PROMETHEUS_METRICS, PROMETHEUS_LABELS = {"up"}, {"instance", "job", "le"}
PANELS_WITHOUT_QUERIES = {"row"}
Document = dict[str, Any]

# --- What an expression names ------------------------------------------------------------------------------------

_TOKEN = re.compile(
    r"""
      (?P<space>\s+|\#[^\n]*)
    | (?P<string>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|`[^`]*`)
    | (?P<variable>\$\{\w+(?::\w+)?\}|\$\w+)
    | (?P<number>(?:\d|\.\d)[\w.]*)
    | (?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)
    | (?P<sign>=~|!~|==|!=|<=|>=|[-+*/%^<>=(){}\[\],@])
    """,
    re.VERBOSE,
)
_OPERATORS = {"and", "or", "unless", "atan2", "bool", "offset"}
_LABELS_FOLLOW = {"by", "without", "on", "ignoring", "group_left", "group_right"}
_NUMBERS = {"inf", "nan"}


@dataclass
class Named:
    metrics: set[str] = field(default_factory=set)
    labels: set[str] = field(default_factory=set)


def named(expression: str) -> Named:
    """Metrics and labels of a PromQL expression, which may hold Grafana's variables. ValueError if it is no PromQL."""
    tokens, found, at = list(_tokens(expression)), Named(), 0

    def until(end: str) -> list[tuple[str, str]]:
        nonlocal at
        inside = list(itertools.takewhile(lambda token: token != ("sign", end), tokens[at:]))
        at += len(inside) + 1
        if at > len(tokens):
            raise ValueError(f"{end} is missing in {expression}")
        return inside

    while at < len(tokens):
        kind, text = tokens[at]
        at += 1
        follows = tokens[at][1] if at < len(tokens) else ""
        if (kind, text) == ("sign", "["):
            until("]")
        elif (kind, text) == ("sign", "{"):
            labels = {text for kind, text in until("}") if kind == "name"}
            if "__name__" in labels:
                raise ValueError(f"a metric is named by its label in {expression}")
            found.labels |= labels
        elif kind == "name" and text in _LABELS_FOLLOW:
            if follows == "(":
                found.labels |= {text for kind, text in until(")") if kind == "name"}
        elif kind == "name" and text.lower() not in _OPERATORS | _NUMBERS and follows not in {"(", "by", "without"}:
            found.metrics.add(text)
    return found


def _tokens(expression: str) -> Iterator[tuple[str, str]]:
    at = 0
    while at < len(expression):
        match = _TOKEN.match(expression, at)
        if match is None:
            raise ValueError(f"no PromQL from {expression[at:]!r} on")
        at = match.end()
        if match.lastgroup != "space":
            yield str(match.lastgroup), match.group()


def test_an_expressions_metrics_and_labels_are_told_from_all_else() -> None:
    found = named(
        """
        sum by (run) (rate(a_total{step=~"b|c{d}", e!='$f'}[$__rate_interval])) # not_this
          / on (g) group_left sum without (h) (clamp_min(i:j{}[5m:1m] offset 1d, 0))
          > bool 1e3 or histogram_quantile(0.9, sum(k_bucket) by (le)) unless ignoring (m) group_right (n) o == +Inf
        """
    )
    assert found.metrics == {"a_total", "i:j", "k_bucket", "o"}
    assert found.labels == {"run", "step", "e", "g", "h", "le", "m", "n"}
    for wrong in ("a{b='c'", 'a{"b', '{__name__=~"a.*"}', "a ; b"):
        with pytest.raises(ValueError, match=r"missing|no PromQL|by its label"):
            named(wrong)


# --- What is exported --------------------------------------------------------------------------------------------


@cache
def of_runs() -> frozenset[str]:
    """As Ray's agent exports them."""
    return frozenset({f"ray_{name}" for name in exported.GAUGES} | {f"ray_{name}_total" for name in exported.COUNTERS})


@cache
def of_the_endpoint() -> dict[str, frozenset[str]]:
    """Metrics by family, the client library's times of creation left out."""
    suffixes = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("",), "gauge": ("",)}
    families = re.findall(r"^# TYPE (\w+) (\w+)$", GatewayMetrics().text().decode(), re.MULTILINE)
    return {
        name: frozenset(name + suffix for suffix in suffixes[kind])
        for name, kind in families
        if not name.endswith("_created")
    }


@cache
def known_metrics() -> frozenset[str]:
    return of_runs().union(*of_the_endpoint().values(), RAYS_METRICS, PROMETHEUS_METRICS)


@cache
def known_labels() -> frozenset[str]:
    """Of all metrics together: which has which is not told apart."""
    metrics = GatewayMetrics()  # a label is seen with its first sample
    metrics.failed(503)
    metrics.finished(reason="stop", prompt=1, tokens=1, calls=1, canvas=1, seconds=1, first=1, waited=1)
    ours = set(re.findall(r'(\w+)="', metrics.text().decode()))
    return frozenset({"run", "step"} | ours | GIVEN_LABELS | RAYS_LABELS | PROMETHEUS_LABELS)


@cache
def _sources_of_ray() -> str:
    folders = [RAY / "dashboard/modules/reporter", RAY / "dashboard/modules/metrics/dashboards"]
    files = [*(file for folder in folders for file in sorted(folder.glob("*.py"))), RAY / "dashboard/consts.py"]
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


@pytest.mark.parametrize("name", sorted(RAYS_METRICS))
def test_the_installed_ray_has_the_metric(name: str) -> None:
    """Declared by its agent without the prefix, or (those of C++) shown by its own dashboards with it."""
    declared = re.escape(name.removeprefix("ray_"))
    assert re.search(rf'"{declared}": Gauge\(|\b{name}\{{', _sources_of_ray())


@pytest.mark.parametrize("label", sorted(RAYS_LABELS))
def test_the_installed_ray_has_the_label(label: str) -> None:
    assert re.search(rf'"{label}"|\b{label}[=!]~?"', _sources_of_ray())


def test_the_endpoints_families_are_found() -> None:
    assert {"dllm_work", "dllm_request_errors_total"} <= set(of_the_endpoint())
    assert "dllm_tokens_per_call_bucket" in of_the_endpoint()["dllm_tokens_per_call"]
    assert {"status", "finished_reason", "tokens"} <= known_labels()


# --- Dashboards --------------------------------------------------------------------------------------------------


def load(name: str) -> Document:
    text = (FOLDER / name).read_text(encoding="utf-8")
    document: Document = json.loads(text) if name.endswith(".json") else yaml.safe_load(text)
    return document


def expressions(board: Document) -> Iterator[tuple[str, str]]:
    """Where it stands, and the expression."""
    for panel in board["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]


def template_queries(board: Document) -> Iterator[tuple[str, str]]:
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            assert variable["definition"] == variable["query"]["query"], variable["name"]
            yield variable["name"], variable["definition"]


def named_by_template(query: str) -> Named:
    """Of the one kind of query that is used."""
    match = re.fullmatch(r"label_values\((.+), *(\w+)\)", query)
    if match is None:
        raise ValueError(f"no known query of a variable: {query}")
    found = named(match[1])
    found.labels.add(match[2])
    return found


def faults_of_names(uses: list[tuple[str, Named]]) -> list[str]:
    return [
        f"{where}: {what} {name} is exported by nobody"
        for where, found in uses
        for what, names, known in (
            ("metric", found.metrics, known_metrics()),
            ("label", found.labels, known_labels()),
        )
        for name in sorted(names - known)
    ]


def faults_of_board(board: Document) -> list[str]:
    """All that can be seen without Grafana."""
    uses = [(where, named(expression)) for where, expression in expressions(board)]
    uses += [(where, named_by_template(query)) for where, query in template_queries(board)]
    return [*faults_of_names(uses), *_faults_of_panels(board), *_overlaps(board), *_faults_of_variables(board)]


def _faults_of_panels(board: Document) -> Iterator[str]:
    ids = [panel["id"] for panel in board["panels"]]
    yield from (f"two panels have the id {number}" for number in sorted({n for n in ids if ids.count(n) > 1}))
    for panel in board["panels"]:
        if panel["type"] in PANELS_WITHOUT_QUERIES:
            continue
        title = panel["title"]
        references = [target["refId"] for target in panel["targets"]]
        if not references or len(set(references)) < len(references):
            yield f"{title}: queries {references}"
        if not panel["fieldConfig"]["defaults"].get("unit"):
            yield f"{title}: has no unit"
        if len(panel["description"]) < 40:
            yield f"{title}: does not say what a bad value means"
        yield from (f"{title}: a recipe has no {path}" for path in unknown_settings(panel["description"]))


def _overlaps(board: Document) -> Iterator[str]:
    places = [(panel["title"], panel["gridPos"]) for panel in board["panels"]]
    for title, place in places:
        if min(place.values()) < 0 or min(place["w"], place["h"]) < 1 or place["x"] + place["w"] > 24:
            yield f"{title}: lies outside the grid"
    for (one, a), (other, b) in itertools.combinations(places, 2):
        if all(a[at] < b[at] + b[size] and b[at] < a[at] + a[size] for at, size in (("x", "w"), ("y", "h"))):
            yield f"{one} and {other} overlap"


def _faults_of_variables(board: Document) -> Iterator[str]:
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    if variables.get("datasource", {}).get("query") != "prometheus":
        yield "no variable chooses the data source"
    for source in _sources(board):
        if source != {"type": "prometheus", "uid": "${datasource}"}:
            yield f"a data source is fixed: {source}"
    mentioned = set(re.findall(r"\$\{?(\w+)", json.dumps([board["panels"], board["templating"]])))
    used = {name for name in mentioned if not name.startswith("__")}  # those are Grafana's own
    yield from (f"no variable {name}" for name in sorted(used - set(variables)))
    yield from (f"the variable {name} is not used" for name in sorted(set(variables) - used))


def _sources(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        if "datasource" in value:
            yield value["datasource"]
        for part in value.values():
            yield from _sources(part)
    elif isinstance(value, list):
        for part in value:
            yield from _sources(part)


@pytest.fixture(params=NAMES)
def board(request: pytest.FixtureRequest) -> Document:
    return load(f"{request.param}.json")


def test_a_dashboard_has_no_fault(board: Document) -> None:
    assert faults_of_board(board) == []
    assert board["schemaVersion"] >= 39


def test_dashboards_can_be_told_apart() -> None:
    boards = [load(f"{name}.json") for name in NAMES]
    assert [board["uid"] for board in boards] == [f"dllm-{name}" for name in NAMES]
    assert len({board["title"] for board in boards}) == len(NAMES)
    assert sorted(file.stem for file in FOLDER.glob("*.json")) == sorted(NAMES)


def test_panels_of_runs_can_be_narrowed_to_one(board: Document) -> None:
    """Each selector of ours has its variable; else the panel would show the runs of all."""
    variable = {"ray_dllm": 'run=~"$run"', "ray": 'SessionName=~"$session"', "dllm": 'instance=~"$endpoint"'}
    for where, expression in expressions(board):
        for metric in named(expression).metrics:
            owner = next(prefix for prefix in variable if metric.startswith(prefix))
            selectors = re.findall(rf"\b{metric}\b(\{{[^}}]*\}})?", expression)
            assert all(variable[owner] in selector for selector in selectors), (where, metric)


def test_every_metric_of_ours_is_shown() -> None:
    boards = [load(f"{name}.json") for name in NAMES]
    shown = {metric for board in boards for _, expression in expressions(board) for metric in named(expression).metrics}
    assert not of_runs() - shown
    assert not [family for family, metrics in of_the_endpoint().items() if not metrics & shown]
    assert not RAYS_METRICS - shown, "the list of Ray's own names is longer than needed"


# --- Alert rules -------------------------------------------------------------------------------------------------


def rules_of(document: Document) -> list[Document]:
    return [rule for group in document["groups"] for rule in group["rules"]]


def faults_of_rules(document: Document) -> list[str]:
    rules = rules_of(document)
    return [
        *faults_of_names([(rule["alert"], named(rule["expr"])) for rule in rules]),
        *(fault for rule in rules for fault in _faults_of_rule(rule)),
    ]


def _faults_of_rule(rule: Document) -> Iterator[str]:
    name, annotations = rule["alert"], rule.get("annotations", {})
    if "for" not in rule:
        yield f"{name}: fires at once"
    if rule.get("labels", {}).get("severity") not in {"critical", "warning"}:
        yield f"{name}: has no severity"
    if not annotations.get("summary") or len(annotations.get("description", "")) < 80:
        yield f"{name}: does not say what is to be done"
    description = annotations.get("description", "")
    for command in re.findall(r"`(dllm [^`]+)`", description):
        yield from (f"{name}: {fault}" for fault in _faults_of_command(command))
    yield from (f"{name}: a recipe has no {path}" for path in unknown_settings(description))


def _faults_of_command(command: str) -> Iterator[str]:
    _, verb, *words = shlex.split(command)
    verbs = get_command(app).commands  # type: ignore[attr-defined]
    if verb not in verbs:
        yield f"there is no {verb} in {command}"
        return
    options = {option for parameter in verbs[verb].params for option in parameter.opts}
    yield from (f"{verb} takes no {word}" for word in words if word.startswith("-") and word not in options)
    if verb == "jobs" and words[0] not in _ACTIONS:
        yield f"jobs cannot {words[0]}"


def unknown_settings(text: str) -> list[str]:
    """Paths that are written as a recipe's settings are, and that none has."""
    paths = re.findall(rf"\b(?:{'|'.join(Recipe.model_fields)})(?:\.[a-z_]+)+\b", text)
    return [path for path in paths if not _is_setting(path.split("."), _schema(), _schema()["$defs"])]


@cache
def _schema() -> Document:
    return Recipe.model_json_schema()


def _is_setting(path: list[str], schema: Document, definitions: Document) -> bool:
    """Whether some alternative of the schema has it."""
    if not path:
        return True
    if "$ref" in schema:
        return _is_setting(path, definitions[schema["$ref"].rpartition("/")[2]], definitions)
    alternatives = [*schema.get("anyOf", []), *schema.get("oneOf", [])]
    first, *rest = path
    here = first in schema.get("properties", {}) and _is_setting(rest, schema["properties"][first], definitions)
    return here or any(_is_setting(path, one, definitions) for one in alternatives)


def test_rules_have_no_fault() -> None:
    assert faults_of_rules(load("alerts.yaml")) == []


def test_rules_are_told_apart_and_all_are_tried() -> None:
    names = [rule["alert"] for rule in rules_of(load("alerts.yaml"))]
    assert len(set(names)) == len(names)
    tried = (FOLDER / "alerts.test.yaml").read_text(encoding="utf-8")
    assert [name for name in names if name not in tried] == []


def test_what_is_scraped_is_what_ray_and_the_endpoint_offer() -> None:
    jobs = {job["job_name"]: job for job in load("prometheus.yaml")["scrape_configs"]}
    [file] = jobs["ray"]["file_sd_configs"][0]["files"]
    constants = (RAY / "_private/ray_constants.py").read_text(encoding="utf-8")
    assert f'PROMETHEUS_SERVICE_DISCOVERY_FILE = "{Path(file).name}"' in constants
    [discovery] = jobs["ray"]["http_sd_configs"]
    assert discovery["url"].endswith(":8265/api/prometheus/sd")
    assert '@routes.get("/api/prometheus/sd")' in _sources_of_ray()
    [endpoint] = jobs["dllm-endpoint"]["static_configs"]
    assert [target.split(":")[1] for target in endpoint["targets"]] == ["8000"]
    scraped = (FOLDER / "prometheus.yaml").read_text(encoding="utf-8")
    assert all(f'labels: {{{label}: "true"}}' in scraped for label in GIVEN_LABELS)
    watched = {rule["expr"] for rule in rules_of(load("alerts.yaml")) if named(rule["expr"]).metrics == {"up"}}
    assert watched == {'up{job="dllm-endpoint"} == 0'}


# --- promtool ----------------------------------------------------------------------------------------------------


@pytest.fixture
def promtool() -> Callable[..., str]:
    """Runs it on files of a folder: "" if it is content, else what it says."""
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")

    def run(*words: str, folder: Path = FOLDER) -> str:
        ended = subprocess.run([program, *words], cwd=folder, capture_output=True, text=True, timeout=60, check=False)
        return "" if ended.returncode == 0 else ended.stdout + ended.stderr or "failed"

    return run


@pytest.mark.parametrize(
    "words",
    [("check", "config", "prometheus.yaml"), ("check", "rules", "alerts.yaml"), ("test", "rules", "alerts.test.yaml")],
    ids=" ".join,
)
def test_promtool_is_content(words: tuple[str, ...], promtool: Callable[..., str]) -> None:
    assert promtool(*words) == ""


def as_rules(board: Document) -> Document:
    """A panel's queries as rules that promtool can check; Grafana's variables stand for what it puts there."""
    rules = [
        {"record": f"panel:{number}", "expr": expression.replace("$__rate_interval", "1m")}
        for number, (_, expression) in enumerate(expressions(board))
    ]
    return {"groups": [{"name": "panels", "rules": rules}]}


def test_promtool_takes_the_panels_queries(board: Document, promtool: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "panels.yaml").write_text(yaml.safe_dump(as_rules(board)))
    assert promtool("check", "rules", "panels.yaml", folder=tmp_path) == ""


# --- Planted mistakes --------------------------------------------------------------------------------------------


def _panel(board: Document, title: str) -> Document:
    (found,) = [panel for panel in board["panels"] if panel["title"] == title]
    panel: Document = found
    return panel


def _misspell_in_panel(board: Document) -> None:
    target = _panel(board, "MFU")["targets"][0]
    target["expr"] = target["expr"].replace("_mfu_ratio", "_mfu")


def _misspell_label(board: Document) -> None:
    target = _panel(board, "MFU")["targets"][0]
    target["expr"] = target["expr"].replace("by (run)", "by (runs)")


def _misspell_in_variable(board: Document) -> None:
    variable = board["templating"]["list"][1]
    variable["definition"] = variable["query"]["query"] = variable["definition"].replace("_train_step", "_train_stop")


def _overlap(board: Document) -> None:
    place = _panel(board, "Learning rate")["gridPos"]
    place["x"] -= 1


def _leave_the_grid(board: Document) -> None:
    _panel(board, "Learning rate")["gridPos"]["w"] += 1


def _share_an_id(board: Document) -> None:
    board["panels"][3]["id"] = board["panels"][2]["id"]


def _lose_unit(board: Document) -> None:
    del _panel(board, "MFU")["fieldConfig"]["defaults"]["unit"]


def _fix_datasource(board: Document) -> None:
    _panel(board, "MFU")["datasource"] = {"type": "prometheus", "uid": "abc"}


def _lose_variable(board: Document) -> None:
    del board["templating"]["list"][-1]


@pytest.mark.parametrize(
    ("plant", "told"),
    [
        (_misspell_in_panel, "MFU: metric ray_dllm_train_mfu is exported by nobody"),
        (_misspell_label, "MFU: label runs is exported by nobody"),
        (_misspell_in_variable, "run: metric ray_dllm_train_stop is exported by nobody"),
        (_overlap, "Gradient norm, before clipping and Learning rate overlap"),
        (_leave_the_grid, "Learning rate: lies outside the grid"),
        (_share_an_id, "two panels have the id 3"),
        (_lose_unit, "MFU: has no unit"),
        (_fix_datasource, "a data source is fixed: {'type': 'prometheus', 'uid': 'abc'}"),
        (_lose_variable, "no variable session"),
    ],
)
def test_a_planted_fault_of_a_dashboard_is_found(plant: Callable[[Document], None], told: str) -> None:
    board = load("training.json")
    plant(board)
    assert faults_of_board(board) == [told]


def _changed_rules(alert: str, change: Callable[[Document], Any]) -> Document:
    document = copy.deepcopy(load("alerts.yaml"))
    (rule,) = [rule for rule in rules_of(document) if rule["alert"] == alert]
    change(rule)
    return document


def _described(text: str) -> Callable[[Document], None]:
    return lambda rule: rule["annotations"].update(description=text.ljust(80, "."))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda rule: rule.update(expr="sum(ray_dllm_train_wait) > 1"), "metric ray_dllm_train_wait is exported by"),
        (lambda rule: rule.update(expr='dllm_work{model="a"} > 1'), "label model is exported by nobody"),
        (lambda rule: rule.pop("for"), "fires at once"),
        (lambda rule: rule["labels"].clear(), "has no severity"),
        (lambda rule: rule["annotations"].pop("description"), "does not say what is to be done"),
        (_described("`dllm restart RUN`"), "there is no restart"),
        (_described("`dllm jobs kill JOB`"), "jobs cannot kill"),
        (_described("`dllm doctor RUN --adress URL`"), "doctor takes no --adress"),
        (_described("Lower train.learn_rate"), "a recipe has no train.learn_rate"),
    ],
)
def test_a_planted_fault_of_a_rule_is_found(change: Callable[[Document], Any], told: str) -> None:
    [fault] = faults_of_rules(_changed_rules("DllmTrainingWaitsForData", change))
    assert told in fault


@pytest.mark.parametrize(
    ("words", "alert", "expression", "told"),
    [
        ("check rules", "DllmWaitingRowsGrow", "max by (instance (dllm_work) > 0", "parse error"),
        ("check rules", "DllmWaitingRowsGrow", "maximum(dllm_work) > 0", "unknown function"),
        ("test rules", "DllmNoReplicas", "dllm_decode_replicas == 1", "DllmNoReplicas"),
        ("test rules", "DllmTrainingStalled", "ray_dllm_train_eta_seconds > 1e9", "DllmTrainingStalled"),
    ],
)
def test_promtool_finds_a_planted_fault(
    words: str, alert: str, expression: str, told: str, promtool: Callable[..., str], tmp_path: Path
) -> None:
    broken = _changed_rules(alert, lambda rule: rule.update(expr=expression))
    (tmp_path / "alerts.yaml").write_text(yaml.safe_dump(broken))
    shutil.copy(FOLDER / "alerts.test.yaml", tmp_path)
    file = "alerts.yaml" if words == "check rules" else "alerts.test.yaml"
    assert told in promtool(*words.split(), file, folder=tmp_path)
