"""cluster.yaml is one Ray's launcher accepts, as far as can be told without a cloud."""

from __future__ import annotations

from pathlib import Path

import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

CLUSTER = Path(__file__).parent.parent / "cluster.yaml"


def test_launcher_accepts_the_file() -> None:
    config = yaml.safe_load(CLUSTER.read_text())
    validate_config(prepare_config(config))


def test_workers_have_gpus_and_the_head_does_not_edit() -> None:
    config = yaml.safe_load(CLUSTER.read_text())
    head, gpu = (config["available_node_types"][name] for name in (config["head_node_type"], "gpu"))
    assert gpu["resources"]["GPU"] >= 1 <= gpu["max_workers"]
    assert "GPU" not in head["resources"]
