"""docker/ and .devcontainer/, without Docker: a stand-in records what the scripts would start."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.paths import REPOSITORY
from tests.support.training_runs import load_main

DOCKER = REPOSITORY / "docker"
SCRIPTS = sorted(DOCKER.glob("*.sh"))
STUB = """#!{python}
import json, os, sys
with open(os.environ["RECORD"], "w") as file:
    json.dump(sys.argv[1:], file)
sys.exit(7)
"""
# Options of `docker run` that take a value as the next word.
VALUED = {"--gpus", "--env", "--name", "--user", "--shm-size", "--stop-timeout", "--volume", "--publish"}


@pytest.fixture
def docker(tmp_path: Path) -> Any:
    """`docker("run.sh", "python3", "x.py", TARGET="cpu")`: what docker is called with."""
    (tmp_path / "bin").mkdir()
    stub = tmp_path / "bin" / "docker"
    stub.write_text(STUB.format(python=sys.executable))
    stub.chmod(0o755)
    places = {name: str(tmp_path / name.lower()) for name in ("DATA", "LOGS", "WEIGHTS")}
    environment = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "RECORD": str(tmp_path / "record"), **places}

    def called(script: str, *words: str, **settings: str) -> list[str]:
        done = subprocess.run(
            ["sh", DOCKER / script, *words],
            env={**environment, **settings},
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 7, done.stderr  # that of docker
        return list(json.loads((tmp_path / "record").read_text()))

    return called


def options_of(words: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Divide the words of `docker run` into options, with their values, and image with command."""
    options: dict[str, list[str]] = {}
    rest = words[1:]
    while rest[0].startswith("-"):
        name, equals, value = rest.pop(0).partition("=")
        options.setdefault(name, []).append(rest.pop(0) if name in VALUED and not equals else value)
    return options, rest


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_posix_shell(script: Path) -> None:
    assert subprocess.run(["sh", "-n", script], check=False).returncode == 0
    assert {path.name for path in SCRIPTS} == {"env.sh", "build.sh", "run.sh", "exec.sh", "mlflow.sh"}


@pytest.mark.parametrize(
    ("target", "base"), [("cuda", "pytorch/pytorch:"), ("cpu", "python:3.12"), ("hpu", "vault.habana.ai/")]
)
def test_build(docker: Any, target: str, base: str) -> None:
    words = docker("build.sh", "--pull", TARGET=target)
    file = words[words.index("--file") + 1]
    assert file == f"{DOCKER}/Dockerfile.{target}" and Path(file).is_file()
    argument = words[words.index("--build-arg") + 1]
    assert argument.startswith(f"BASE={base}") and f"ARG {argument}\n" in Path(file).read_text()
    assert words[words.index("--tag") + 1] == f"yolo-v3:{target}" and words[-2:] == ["--pull", str(REPOSITORY)]


def test_build_of_an_unknown_target() -> None:
    environment = {"PATH": "/usr/bin:/bin", "TARGET": "tpu"}
    command = ["sh", DOCKER / "build.sh"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "TARGET=tpu: must be cuda, cpu or hpu\n")


@pytest.mark.parametrize("target", ["cuda", "cpu", "hpu"])
def test_run(docker: Any, tmp_path: Path, target: str) -> None:
    words = docker("run.sh", "python3", "yolo-v3/main.py", "data.root=my data", "--", "x", TARGET=target)
    assert words[0] == "run"
    options, rest = options_of(words)
    assert rest == [f"yolo-v3:{target}", "python3", "yolo-v3/main.py", "data.root=my data", "--", "x"]
    assert options["--user"] == [f"{os.getuid()}:{os.getgid()}"] and options["--shm-size"] == ["16g"]
    assert int(options["--stop-timeout"][0]) > 10 and "--init" in options and "--rm" in options
    assert (
        f"{REPOSITORY}:/workspace" in options["--volume"] and f"{tmp_path}/logs:/workspace/logs" in options["--volume"]
    )
    assert (tmp_path / "logs").is_dir()  # made by the user, not by Docker
    assert options.get("--gpus") == (["all"] if target == "cuda" else None)
    assert options.get("--runtime") == (["habana"] if target == "hpu" else None)


def test_run_in_the_background(docker: Any) -> None:
    options, rest = options_of(docker("run.sh", DETACH="1", MLFLOW_TRACKING_URI="http://host:5000", USER_ID="1234"))
    assert "--detach" in options and "--rm" not in options and rest == ["yolo-v3:cuda"]
    assert options["--env"] == ["MLFLOW_TRACKING_URI"] and options["--user"][0].startswith("1234:")


def test_exec(docker: Any) -> None:
    assert docker("exec.sh") == ["exec", "yolo-v3", "bash"]
    assert docker("exec.sh", "nvidia-smi", CONTAINER="other") == ["exec", "other", "nvidia-smi"]


def test_mlflow(docker: Any) -> None:
    options, rest = options_of(docker("mlflow.sh", MLFLOW_PORT="5555"))
    assert options["--publish"] == ["127.0.0.1:5555:5000"] and rest[1:3] == ["mlflow", "server"]


@pytest.mark.parametrize("path", sorted(DOCKER.glob("Dockerfile.*")), ids=lambda path: path.name)
def test_dockerfiles(path: Path) -> None:
    text = path.read_text()
    assert re.search(r"^USER \d+:\d+$", text, re.MULTILINE) and "useradd" not in text
    assert re.search(r'^CMD \["', text, re.MULTILINE) and "STOPSIGNAL SIGTERM" in text
    for name in re.findall(r"^COPY (\S+) /", text, re.MULTILINE):
        assert (REPOSITORY / name).is_file()
    if path.suffix != ".cpu":  # the image's torch stays
        assert "-c /opt/constraints.txt" in text and "requirements-hpu.txt" in text


# Compose

DEFAULT = re.compile(r"(?<!\$)\$\{(\w+)(?::-((?:[^{}]|\$\{[^}]*\})*))?\}")


def filled(text: str, values: dict[str, str]) -> str:
    """Replace variables as compose does, with defaults inside of defaults."""
    while DEFAULT.search(text):
        text = DEFAULT.sub(lambda found: values.get(found[1], found[2] or ""), text)
    return text.replace("$$", "$")


def compose(name: str, **values: str) -> Any:
    return yaml.safe_load(filled((DOCKER / name).read_text(), values))


def test_compose() -> None:
    services = compose("compose.yaml", TARGET="cpu", USER_ID="1234", GROUP_ID="99")["services"]
    assert set(services) == {"train", "tensorboard", "mlflow"}
    for service in services.values():
        assert service["image"] == "yolo-v3:cpu" and service["user"] == "1234:99" and service["init"] is True
        assert service["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL") and isinstance(service["command"], list)
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    train = services["train"]
    assert train["build"]["dockerfile"] == "docker/Dockerfile.cpu" and train["stop_grace_period"] == "2m"
    assert train["depends_on"] == {"mlflow": {"condition": "service_healthy"}} and train["shm_size"] == "16gb"
    assert train["environment"]["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    assert any("mlflow:5000" in word for word in services["mlflow"]["command"] if "--allowed-hosts" in word)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, ["run.loggers=[files,tensorboard,mlflow]"]),
        ({"WORDS": "data.root=data/coco run.loggers=[files,mlflow]", "RUN": "b"}, ["data.root=data/coco"]),
    ],
)
def test_compose_trains(
    given: dict[str, str], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command is run with a stand-in for python3; what that gets is understood by yolo-v3/main.py."""
    train = compose("compose.yaml", **given)["services"]["train"]
    stub = tmp_path / "python3"
    stub.write_text(STUB.format(python=sys.executable))
    stub.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "RECORD": str(tmp_path / "record"), **train["environment"]}
    assert subprocess.run(train["command"], env=environment, cwd=REPOSITORY, check=False).returncode == 7
    script, *arguments = json.loads((tmp_path / "record").read_text())
    assert script == "yolo-v3/main.py"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    parsed = load_main().parse_arguments()
    assert parsed.output == Path("logs") / given.get("RUN", "compose") and set(words) <= set(parsed.settings)


def test_compose_of_accelerators() -> None:
    [device] = compose("compose.cuda.yaml")["services"]["train"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert compose("compose.hpu.yaml")["services"]["train"]["runtime"] == "habana"


@pytest.mark.parametrize("path", ["devcontainer.json", "cuda/devcontainer.json"])
def test_devcontainers(path: str) -> None:
    file = REPOSITORY / ".devcontainer" / path
    content = json.loads(file.read_text())
    assert (file.parent / content["build"]["dockerfile"]).is_file()
    assert (file.parent / content["build"]["context"]).resolve() == REPOSITORY
    assert ("--gpus=all" in content["runArgs"]) == ("cuda" in path)


def test_the_image_gets_no_data_and_no_runs() -> None:
    ignored = (REPOSITORY / ".dockerignore").read_text().splitlines()
    assert {".git", "data/*", "logs/*", "models/weights/*", ".venv", "mlartifacts"} <= set(ignored)
