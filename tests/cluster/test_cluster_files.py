"""cluster.yaml and cluster.local.yaml against Ray's own checks, and against what those forget. Nothing is asked of any cloud."""

import copy
import re
import tomllib
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from tests.helpers import ROOT

Config = dict[str, Any]
_FILES = ["cluster.yaml", "cluster.local.yaml"]
_COMMANDS = ["initialization_commands", "setup_commands", "head_start_ray_commands", "worker_start_ray_commands"]
# Keys of AWS, private keys, and a token that is written out where it should be read from its file.
_SECRET = re.compile(
    r"(AKIA|ASIA)[A-Z0-9]{16}|PRIVATE KEY-----|(secret|password|token)\w*\s*[=:]\s*[\"']?[\w/+]{16,}", re.IGNORECASE
)


def shipped(name: str) -> Config:
    return yaml.safe_load((ROOT / name).read_text())


def accepted(config: Config) -> Config:
    """As `ray up` reads it, with Ray's defaults. Raises what Ray and jsonschema raise."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def forgotten(config: Config) -> list[str]:
    """What neither Ray's schema nor its checks miss, and a cluster cannot do without."""
    provider, types = config["provider"], config.get("available_node_types", {})
    problems = []
    if provider["type"] == "aws":
        problems += [f"no {key}" for key in ("region",) if not provider.get(key)]
        if config.get("head_node_type") not in types:
            problems.append("head_node_type is none of available_node_types")
        for name, kind in types.items():
            needs = {"InstanceType", "ImageId", "IamInstanceProfile", "BlockDeviceMappings"}
            problems += [f"{name} has no {key}" for key in sorted(needs - kind["node_config"].keys())]
            least, most = kind.get("min_workers", 0), kind.get("max_workers", 0)
            if not least <= most <= config["max_workers"]:
                problems.append(f"{name}: {least} to {most} nodes, of {config['max_workers']}")
    else:
        problems += [f"no {key}" for key in ("head_ip", "worker_ips") if not provider.get(key)]
        problems += [f"no {key}" for key in ("ssh_user", "ssh_private_key") if not config.get("auth", {}).get(key)]
    # Without commands of its own a file gets Ray's defaults: of AWS those install a nightly wheel and open the dashboard to all.
    problems += [f"no {key}" for key in _COMMANDS[1:] if not config.get(key)]
    return problems


@pytest.mark.parametrize("name", _FILES)
def test_ray_takes_the_file_and_nothing_is_missing(name):
    config = shipped(name)
    accepted(config)
    assert forgotten(config) == []


@pytest.mark.parametrize("name", _FILES)
def test_a_misspelt_field_is_refused_by_the_schema(name):
    import jsonschema

    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minute"):
        accepted(shipped(name) | {"idle_timeout_minute": 5})


def _delete(*keys: str) -> Callable[[Config], None]:
    def change(config: Config) -> None:
        for key in keys[:-1]:
            config = config[key]
        del config[keys[-1]]

    return change


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("cluster.yaml", _delete("provider", "region"), "region"),
        ("cluster.yaml", lambda config: config.update(head_node_type="chief"), "head_node_type"),
        ("cluster.yaml", _delete("available_node_types", "gpu", "node_config", "ImageId"), "gpu has no ImageId"),
        ("cluster.yaml", lambda config: config["available_node_types"]["gpu"].update(max_workers=9), "1 to 9 nodes, of 4"),
        ("cluster.yaml", _delete("setup_commands"), "setup_commands"),
        ("cluster.local.yaml", _delete("auth", "ssh_private_key"), "ssh_private_key"),
    ],
)
def test_what_is_missing_is_found(name, change, says):
    config = shipped(name)
    change(config)
    assert any(says in problem for problem in forgotten(config))


def test_the_head_on_aws_trains_nothing_and_workers_come_and_go():
    types = accepted(shipped("cluster.yaml"))["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0} and types["head"]["max_workers"] == 0
    assert types["gpu"]["max_workers"] > 0 and shipped("cluster.yaml")["idle_timeout_minutes"] > 0


def test_every_machine_of_a_lab_is_started_and_kept():
    config = accepted(shipped("cluster.local.yaml"))
    (kind,) = config["available_node_types"].values()
    assert kind["min_workers"] == kind["max_workers"] == len(config["provider"]["worker_ips"])
    assert any("RAY_enable_autoscaler_v2=0 ray start" in command for command in config["head_start_ray_commands"])


@pytest.mark.parametrize("name", _FILES)
def test_every_node_gets_the_whole_project(name):
    """All that pip needs to install it, and no folder in which shards, runs or environments lie."""
    config = shipped(name)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {package.split(".")[0] for package in project["tool"]["setuptools"]["packages"]}
    files = {"pyproject.toml", "constraints.txt", project["project"]["readme"], *project["project"]["license-files"]}
    own = {far: near for far, near in config["file_mounts"].items() if far.startswith("~/patchclr/")}
    assert set(own.values()) == packages | files
    for far, near in own.items():
        assert far == f"~/patchclr/{near}"
        assert (ROOT / near).exists()
    assert any("-c ~/patchclr/constraints.txt -e ~/patchclr" in command for command in config["setup_commands"])


def test_both_files_set_nodes_up_alike():
    one, other = (shipped(name) for name in _FILES)
    for key in ("file_mounts", "rsync_exclude", "setup_commands"):
        assert one[key] == other[key]


@pytest.mark.parametrize("name", _FILES)
def test_no_secret_is_written_out_and_nothing_listens_beyond_the_host(name):
    text, config = (ROOT / name).read_text(), shipped(name)
    assert not _SECRET.search(text)
    commands = [command for key in _COMMANDS for command in config.get(key, [])]
    assert not any("RAY_AUTH_TOKEN" in command or "http" in command for command in commands)  # no wheel from elsewhere, either
    assert any("chmod 600 ~/.ray/auth_token" in command for command in commands)
    assert any("RAY_AUTH_MODE=token" in command for command in commands)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    (start,) = (command for command in config["head_start_ray_commands"] if "--head" in command)
    assert "--dashboard-host=127.0.0.1" in start


@pytest.mark.parametrize(
    "text", ["aws_secret_access_key: abcdefghijklmnop/123", "RAY_AUTH_TOKEN=0123456789abcdef0", "AKIA" + "A" * 16]
)
def test_a_secret_would_be_seen(text):
    assert _SECRET.search(text)
