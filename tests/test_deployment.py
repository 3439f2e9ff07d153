"""docker/, examples/ and docs/deployment.md name only what exists."""

import re

import pytest
from deployment_files import (
    DOCKERFILE,
    GUIDE,
    ROOT,
    compose_service,
    container,
    guide_commands,
    instructions,
    kubernetes,
    pod,
    served,
)

import vllm_dms
from vllm_dms.compat import TESTED_VERSIONS
from vllm_dms.config import DMSConfig
from vllm_dms.core.metrics import COUNTERS, GAUGES

IMAGE = "vllm-dms:"


@pytest.fixture(scope="module")
def parser():
    """That of `vllm serve`."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.plugins import load_general_plugins
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    load_general_plugins()
    return ServeSubcommand().subparser_init(FlexibleArgumentParser().add_subparsers())


def test_the_dockerfile_is_one_layer_over_an_image_of_a_tested_version():
    (default,) = (rest for word, rest in instructions() if word == "ARG")
    name, version = default.split("=")
    assert name == "VLLM_VERSION" and version in TESTED_VERSIONS
    assert ("FROM", "vllm/vllm-openai:v${VLLM_VERSION}") in instructions()
    (tested,) = re.findall(r"# Tested: (.*)", DOCKERFILE.read_text())
    assert tuple(tested.split(", ")) == TESTED_VERSIONS
    assert [word for word, _ in instructions()] == ["ARG", "FROM", "RUN", "ENTRYPOINT"]
    assert ("ENTRYPOINT", '["vllm", "serve"]') in instructions()


def test_the_layer_takes_nothing_from_a_network():
    (layer,) = (rest for word, rest in instructions() if word == "RUN")
    assert {"--no-deps", "--offline"} <= set(layer.split())


def test_compose_builds_the_dockerfile_from_the_folder_that_the_wheel_is_built_into():
    build = compose_service()["build"]
    context = (ROOT / "examples" / build["context"]).resolve()
    assert context == ROOT / "dist"
    assert (context / build["dockerfile"]).resolve() == DOCKERFILE
    assert build["args"]["VLLM_VERSION"] in TESTED_VERSIONS


def test_images_are_named_by_the_version_of_vllm_in_them():
    words = " ".join(" ".join(words) for words in guide_commands())
    names = [compose_service()["image"], container()["image"], *re.findall(r"vllm-dms:\S+", words)]
    assert len(names) > 2, names
    for name in names:
        assert name.startswith(IMAGE) and name.removeprefix(IMAGE) in TESTED_VERSIONS
    assert compose_service()["build"]["args"]["VLLM_VERSION"] == names[0].removeprefix(IMAGE)


@pytest.mark.parametrize("where", served())
def test_vllm_accepts_what_is_served_and_it_is_served_with_dms(parser, where):
    line = served()[where]
    args = parser.parse_args(line)
    # A model that is not a flag's value; exact names, where the parser also takes beginnings.
    assert args.model_tag == line[0]
    known = {option for action in parser._actions for option in action.option_strings}
    assert {word.partition("=")[0] for word in line if word.startswith("--")} <= known
    assert args.kv_cache_dtype in ("dms", "dms_fp8")


@pytest.mark.parametrize("where", ["compose", "kubernetes"])
def test_examples_bound_memory_and_requests_and_have_settings_that_dms_accepts(parser, where):
    args = parser.parse_args(served()[where])
    assert 0 < args.gpu_memory_utilization < 1 and args.max_num_seqs and args.max_model_len
    settings = args.additional_config["dms"]
    keys = {"dms_window_size": 512, "dms_alpha_scale": 1.0, "dms_initial_alpha_offset": 0.0}
    assert DMSConfig.from_checkpoint(keys, overrides=settings) is not None


def test_examples_serve_the_same_thing():
    assert compose_service()["command"] == container()["args"]


def test_running_requests_end_before_the_container_is_killed(parser):
    timeout = parser.parse_args(container()["args"]).shutdown_timeout
    assert 0 < timeout < pod()["spec"]["terminationGracePeriodSeconds"]
    assert timeout < int(compose_service()["stop_grace_period"].removesuffix("s"))


def test_health_is_asked_where_vllm_serves_it(parser):
    from vllm.entrypoints.serve.instrumentator.health import router

    assert "/health" in {route.path for route in router.routes}
    port = parser.get_default("port")
    names = {p["name"]: p["containerPort"] for p in container()["ports"]}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = container()[probe]["httpGet"]
        assert asked["path"] == "/health" and names[asked["port"]] == port
    assert f"http://127.0.0.1:{port}/health" in compose_service()["healthcheck"]["test"][-1]
    assert compose_service()["ports"] == [f"{port}:{port}"]


def test_prometheus_is_sent_to_the_metrics(parser):
    annotations = pod()["metadata"]["annotations"]
    assert annotations["prometheus.io/scrape"] == "true"
    assert annotations["prometheus.io/port"] == str(parser.get_default("port"))
    assert annotations["prometheus.io/path"] == "/metrics"


def test_the_kubernetes_objects_belong_together():
    labels = pod()["metadata"]["labels"]
    assert kubernetes("Deployment")["spec"]["selector"]["matchLabels"] == labels
    assert kubernetes("Service")["spec"]["selector"] == labels
    (claim,) = (
        v["persistentVolumeClaim"] for v in pod()["spec"]["volumes"] if v["name"] == "cache"
    )
    assert claim["claimName"] == kubernetes("PersistentVolumeClaim")["metadata"]["name"]
    mounted = {m["name"] for m in container()["volumeMounts"]}
    assert mounted == {v["name"] for v in pod()["spec"]["volumes"]}
    # Kubernetes would set VLLM_PORT to the address of a service of that name.
    assert kubernetes("Service")["metadata"]["name"] != "vllm"
    assert pod()["spec"]["enableServiceLinks"] is False


def test_the_guide_names_flags_settings_metrics_and_files_that_exist(parser):
    text = GUIDE.read_text()
    flags = {flag for flag in re.findall(r"`(--[a-z-]+)", text)}
    known = {option for action in parser._actions for option in action.option_strings}
    assert flags and flags <= known
    ours = set(re.findall(r"vllm:dms_(\w+)", text))
    assert ours and ours <= {*GAUGES, *(f"{name}_total" for name in COUNTERS), "info"}
    assert "`reserve_compression`" in text and "`page_size`" in text
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert (GUIDE.parent / link).resolve().exists(), link
    for words in guide_commands():
        if words[:2] == ["vllm-dms", "demo"]:
            assert set(words[2:]) <= {"--path", "--no-control"}


def test_wheels_in_the_guide_have_the_name_of_this_version():
    names = set(re.findall(r"[\w.]*\w-[\w.-]+\.whl", GUIDE.read_text()))
    assert names == {f"vllm_dms-{vllm_dms.__version__}-py3-none-any.whl"}
