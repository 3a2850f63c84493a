"""The examples below `jobs/schedule`: each parses, says what it should, and its commands are commands of this program."""

from __future__ import annotations

import configparser
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from job import binary, tidemill

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "jobs/schedule"
SMALL = ROOT / "jobs/small.toml"
A_PERSON_DECIDES = {2, *range(20, 30)}


def accepts(words: list[str]) -> None:
    """The program takes these words, with the small job for the one that is named. `--help` at their end runs nothing."""
    words = [str(SMALL) if word.endswith(".toml") else word for word in words]
    tidemill(*words, "--help").expect(0)
    tidemill("check", SMALL).expect(0)


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / "kubernetes" / name).read_text()))


def test_the_crontab_has_one_line_and_tells_only_of_what_a_person_decides(tmp_path: Path) -> None:
    lines = [line for line in (FOLDER / "crontab").read_text().splitlines() if line and line[0] not in "#SPK"]
    (line,) = lines
    assert line.startswith("*/5 * * * *  ")
    command = line.split("  ", 1)[1]
    words = re.search(r"tidemill (run [^>]+?) >>", command)
    assert words
    accepts(shlex.split(words.group(1)))
    assert "%" not in command, "cron would make a line break of it"
    # the line as cron runs it, with a program that ends with each code
    (tmp_path / "tidemill").mkdir()
    program = tmp_path / "bin"
    program.mkdir()
    for code, is_told in [(0, False), (10, False), (13, False), (19, False), (1, True), (2, True), (21, True), (29, True)]:
        (program / "tidemill").write_text(f"#!/bin/sh\nexit {code}\n")
        (program / "tidemill").chmod(0o755)
        environment = {"HOME": str(tmp_path), "PATH": f"{program}:{os.environ['PATH']}"}
        shell = subprocess.run(["/bin/sh", "-c", command], env=environment, capture_output=True, text=True, check=False)
        assert bool(shell.stdout) == is_told, (code, shell)


def unit(name: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, strict=True)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string((FOLDER / "systemd" / name).read_text())
    return parser


def codes(text: str) -> set[int]:
    return {int(word) for word in text.split()}


@pytest.mark.parametrize("name", ["tidemill@.service", "tidemill-continuous@.service"])
def test_a_unit_runs_a_command_of_this_program(name: str) -> None:
    service = unit(name)["Service"]
    path, *words = shlex.split(service["ExecStart"])
    assert path == "/usr/local/bin/tidemill"
    accepts(words)


def test_units_treat_exit_codes_as_they_are_meant(tmp_path: Path) -> None:
    drain, follow = unit("tidemill@.service")["Service"], unit("tidemill-continuous@.service")["Service"]
    assert drain["Type"] == "oneshot" and codes(drain["SuccessExitStatus"]) <= set(range(10, 20))
    assert codes(follow["SuccessExitStatus"]) == {13}
    assert codes(follow["RestartPreventExitStatus"]) == A_PERSON_DECIDES
    assert unit("tidemill@.timer")["Timer"]["OnCalendar"] == "*:0/5"
    analyze = shutil.which("systemd-analyze")
    if analyze:
        for name in ("tidemill@", "tidemill-continuous@"):
            text = (FOLDER / f"systemd/{name}.service").read_text()
            (tmp_path / f"{name}small.service").write_text(text.replace("/usr/local/bin/tidemill", str(binary())))
        shutil.copy(FOLDER / "systemd/tidemill@.timer", tmp_path / "tidemill@small.timer")
        verified = subprocess.run(
            [analyze, "verify", *map(str, sorted(tmp_path.iterdir()))], capture_output=True, text=True, check=False
        )
        assert (verified.returncode, verified.stderr) == (0, ""), verified


def test_the_cron_job_forbids_a_second_copy_and_stops_where_a_person_decides() -> None:
    claim, cron = documents("cronjob.yaml")
    spec = cron["spec"]
    assert (cron["apiVersion"], cron["kind"], spec["concurrencyPolicy"]) == ("batch/v1", "CronJob", "Forbid")
    job = spec["jobTemplate"]["spec"]
    rules = {rule["action"]: rule["onExitCodes"]["values"] for rule in job["podFailurePolicy"]["rules"] if "onExitCodes" in rule}
    assert set(rules["FailJob"]) == A_PERSON_DECIDES and rules["Ignore"] == [10, 13]
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never", "a policy on exit codes asks for it"
    check_pod(pod, claim)


def test_the_deployment_has_one_copy_that_is_never_doubled() -> None:
    claim, _ = documents("cronjob.yaml")
    (deployment,) = documents("deployment.yaml")
    spec = deployment["spec"]
    assert (deployment["apiVersion"], deployment["kind"]) == ("apps/v1", "Deployment")
    assert (spec["replicas"], spec["strategy"]["type"]) == (1, "Recreate")
    assert spec["selector"]["matchLabels"] == spec["template"]["metadata"]["labels"]
    check_pod(spec["template"]["spec"], claim)
    (container,) = spec["template"]["spec"]["containers"]
    assert "--continuous" in container["command"]


def check_pod(pod: dict[str, Any], claim: dict[str, Any]) -> None:
    """Its command is one of ours, and its state outlives it."""
    (container,) = pod["containers"]
    program, *words = container["command"]
    assert program == "tidemill"
    accepts(words)
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes.keys()
    assert volumes["state"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert pod["terminationGracePeriodSeconds"] >= 60


class Skipped(Exception):
    """Stands for Airflow's."""


class Retried(Exception):
    """Stands for Airflow's."""


class Failed(Exception):
    """Stands for Airflow's."""


@pytest.mark.parametrize(
    ("code", "ends"),
    [(0, None), (10, Skipped), (11, Retried), (13, Retried), (19, Retried), (1, Failed), (2, Failed), (20, Failed)],
)
def test_the_dag_skips_retries_and_fails_by_exit_code(
    code: int, ends: type[Exception] | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tasks: list[Callable[[], None]] = []
    settings: dict[str, Any] = {}

    def dag(**given: Any) -> Callable[[Callable[[], None]], Callable[[], None]]:
        settings.update(given)
        return lambda function: function

    def task(function: Callable[[], None]) -> Callable[[], None]:
        tasks.append(function)
        return lambda: None

    decorators = types.ModuleType("airflow.decorators")
    decorators.__dict__.update(dag=dag, task=task)
    exceptions = types.ModuleType("airflow.exceptions")
    exceptions.__dict__.update(AirflowException=Retried, AirflowFailException=Failed, AirflowSkipException=Skipped)
    for name, module in [
        ("airflow", types.ModuleType("airflow")), ("airflow.decorators", decorators), ("airflow.exceptions", exceptions),
    ]:  # fmt: skip
        monkeypatch.setitem(sys.modules, name, module)
    names = runpy.run_path(str(FOLDER / "airflow/tidemill_drain.py"))
    assert settings["max_active_runs"] == 1 and not settings["catchup"]
    accepts(names["COMMAND"][1:])
    (tmp_path / "tidemill").write_text(f"#!/bin/sh\nexit {code}\n")
    (tmp_path / "tidemill").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (drain,) = tasks
    if ends is None:
        drain()
    else:
        with pytest.raises(ends):
            drain()
