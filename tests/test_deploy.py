"""The files in deploy/ against the code: what they name must exist, and what they wait for must fit."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from ktransformers.scheduler.protocol import Status
from ktransformers.server.auth import ADMIN
from ktransformers.server.config import ENV_PREFIX, ServerConfig, settings
from ktransformers.server.errors import RequestError
from ktransformers.server.metrics import Metrics
from ktransformers.server.supervisor import STOP_SECONDS

DEPLOY = Path(__file__).parent.parent / "deploy"
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "ktransformers.json"
ALERTS = DEPLOY / "prometheus" / "alerts.yml"
UNIT = DEPLOY / "systemd" / "ktransformers.service"


def compose() -> Any:
    return yaml.safe_load((DEPLOY / "docker-compose.yml").read_text())


def defaults(struct: type[msgspec.Struct]) -> dict[str, Any]:
    return {field.name: field.default for field in msgspec.structs.fields(struct)}


@pytest.fixture(scope="module")
def exported() -> dict[str, set[str]]:
    """The series that the server exports once everything has happened, and the labels of each."""
    zero = {bool: True, int: 0, float: 0.0, str: ""}
    fields = msgspec.structs.fields(Status)
    status = Status(**{field.name: zero.get(field.type, []) for field in fields})
    metrics = Metrics("model", lambda: status)
    metrics.finished("stop")
    metrics.failed("internal")
    metrics.http_request("GET", "/", 200, 0.1)
    series = re.findall(r"^(ktransformers_\w+)(?:\{(.*)\})?", metrics.render().decode(), re.MULTILINE)
    return {name: set(re.findall(r"(\w+)=", labels)) for name, labels in series}


def dashboard_queries() -> list[str]:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", [])]


def alert_queries() -> list[str]:
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return [rule["expr"] for group in groups for rule in group["rules"]]


def test_every_metric_that_is_asked_for_exists(exported: dict[str, set[str]]) -> None:
    queries = dashboard_queries() + alert_queries()
    asked = set(re.findall(r"\bktransformers_\w+", " ".join(queries)))
    assert len(queries) > 30
    assert asked - set(exported) == set()


def test_every_label_that_is_asked_for_exists(exported: dict[str, set[str]]) -> None:
    queries = " ".join(dashboard_queries() + alert_queries())
    matchers = " ".join(re.findall(r"\{([^}]*)\}", queries))
    asked = set(re.findall(r"(\w+)=", matchers))
    for group in re.findall(r"\bby \(([^)]*)\)", queries):
        asked |= set(group.split(", "))
    # Prometheus itself adds the first two.
    assert asked - {"instance", "job"}.union(*exported.values()) == set()


def test_alerts_name_error_codes_that_exist() -> None:
    for codes in re.findall(r'code=~"([^"]+)"', " ".join(alert_queries())):
        for code in codes.split("|"):
            assert RequestError(code, "").status_code >= 500


def test_dashboard_panels_are_distinct_and_do_not_overlap() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        rows, columns = range(place["y"], place["y"] + place["h"]), range(place["x"], place["x"] + place["w"])
        cells = {(row, column) for row in rows for column in columns}
        assert not cells & taken and max(columns) < 24
        taken |= cells


def test_compose_settings_exist_and_files_are_there() -> None:
    server = compose()["services"]["server"]
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    variables = [*server["environment"], *re.findall(rf"{ENV_PREFIX}\w+(?==)", dockerfile)]
    assert {name.removeprefix(ENV_PREFIX).lower() for name in variables} <= set(settings())
    for service in compose()["services"].values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert not source.startswith("./") or (DEPLOY / source).is_dir(), volume


def test_services_have_no_power_that_they_do_not_need() -> None:
    for service in compose()["services"].values():
        assert service["read_only"] and service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert all(re.match(r"(\$\{KT_LISTEN:-)?127\.0\.0\.1:", port) for port in service.get("ports", []))


def test_ports_and_keys_agree() -> None:
    port = str(defaults(ServerConfig)["port"])
    scrape = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["scrape_configs"][0]
    assert scrape["static_configs"][0]["targets"] == [f"server:{port}"]
    assert Path(scrape["authorization"]["credentials_file"]).name == f"{ADMIN}-key"
    assert compose()["services"]["server"]["ports"][0].endswith(f":{port}")
    assert f"EXPOSE {port}\n" in (DEPLOY / "Dockerfile").read_text()


def test_nobody_is_killed_while_draining() -> None:
    needed = defaults(ServerConfig)["drain_timeout"] + 3 * STOP_SECONDS
    unit = UNIT.read_text()
    stop = re.search(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)
    assert stop is not None and int(stop[1]) > needed
    assert int(compose()["services"]["server"]["stop_grace_period"].removesuffix("s")) > needed
    # The other processes must not get the signal that tells the supervisor to drain.
    assert "\nKillMode=mixed\n" in unit


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    copy = tmp_path / UNIT.name
    # It looks for the program, too, which is not installed there.
    copy.write_text(UNIT.read_text().replace("/opt/ktransformers/bin/ktransformers", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", copy], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
