"""What else deploys the gateway: the Dockerfile, Argo CD's example, Terraform's module, workflows.

The second half of `make chart`. The example's values are rendered with the chart, and checked as
its own cases are. Where terraform is on PATH, the module is formatted, validated and tested with
mocked providers (schema_provider.py), without a registry or an account. Where actionlint is, it
reads the workflows.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import helm_python
import yaml

import chart_check
import schema_provider

ROOT: Final = Path(__file__).parents[1]
ARGOCD: Final = ROOT / "deploy" / "argocd"
DOCKERFILE: Final = ROOT / "helm" / "Dockerfile"
MODULES: Final = (ROOT / "deploy" / "terraform" / "aws",)
WORKFLOWS: Final = ROOT / ".github" / "workflows"
TOOL_TIMEOUT_S: Final = 300.0

Object = dict[str, Any]


# --- the image ------------------------------------------------------------------------------------


def dockerfile_problems(text: str) -> Iterator[str]:
    """What the image would have that it should not, or lacks."""
    text = re.sub(r"\\\n\s*", "", text)  # a command a line
    if not re.match(r"# syntax=\S+@sha256:[0-9a-f]{64}\n", text):
        yield "Dockerfile: its frontend is not pinned by a digest"
    arguments = dict(re.findall(r"^ARG (\w+)=(\S+)$", text, re.MULTILINE))
    stages = re.split(r"^(?=FROM )", text, flags=re.MULTILINE)[1:]
    for stage in stages:
        image = stage.split()[1]
        image = re.sub(r"\$\{(\w+)\}", lambda match: arguments.get(match[1], ""), image)
        if not re.search(r"@sha256:[0-9a-f]{64}$", image):
            yield f"Dockerfile: {image} is not pinned by a digest"
    last = stages[-1]
    if len(stages) < 2 or "COPY --from=" not in last:
        yield "Dockerfile: builds where it runs"
    if re.search(r"apt-get|gcc|build-essential|pip install|image_tree", last):
        yield "Dockerfile: its last stage installs or builds"
    user = re.findall(r"^USER (\S+)$", last, re.MULTILINE)
    if not user or not re.fullmatch(r"[1-9]\d{4,}:[1-9]\d{4,}", user[-1]):
        yield "Dockerfile: its last user is not a number that Kubernetes can see is not root"
    if '["python", "-m", "gateway", "health"]' not in last.partition("HEALTHCHECK")[2]:
        yield "Dockerfile: its health is not asked by the gateway's own command"
    if "STOPSIGNAL SIGTERM" not in last:
        yield "Dockerfile: does not say which signal drains"


# --- Argo CD --------------------------------------------------------------------------------------


def documents(path: Path) -> list[Object]:
    """The documents of a YAML file."""
    return [each for each in yaml.safe_load_all(path.read_text("utf-8")) if each]


def argocd_problems(chart: helm_python.Chart) -> Iterator[str]:
    """An example that does not render, or that names what is not there."""
    given = [each for path in sorted(ARGOCD.glob("*.yaml")) for each in documents(path)]
    made = {
        each["spec"]["target"]["name"]: {key["secretKey"] for key in each["spec"]["data"]}
        for each in given
        if each["kind"] == "ExternalSecret"
    }
    projects = chart_check.named(given, "AppProject")
    applications = chart_check.named(given, "Application")
    if not applications:
        yield "deploy/argocd: has no Application"
    for name, application in applications.items():
        spec = application["spec"]
        source, helm = spec["source"], spec["source"]["helm"]
        project = projects.get(spec["project"], {}).get("spec", {})
        if source["repoURL"] not in project.get("sourceRepos", []):
            yield f"deploy/argocd: {name}: its project forbids its repository"
        if spec["destination"] not in project.get("destinations", []):
            yield f"deploy/argocd: {name}: its project forbids its destination"
        if (ROOT / source["path"]).resolve() != chart_check.CHART.resolve():
            yield f"deploy/argocd: {name}: {source['path']} is not the chart"
        values, namespace = helm["valuesObject"], spec["destination"]["namespace"]
        try:
            objects, notes = chart_check.render(chart, values, helm["releaseName"], namespace)
        except helm_python.HelmError as error:
            yield f"deploy/argocd: {name}: {error}"
            continue
        for problem in chart_check.case_problems(objects, notes, namespace):
            yield f"deploy/argocd: {name}: {problem}"
        for server in ("postgres", "redis"):
            secret, key = values[server]["existingSecret"], {"postgres": "dsn", "redis": "url"}
            if key[server] not in made.get(secret, set()):
                yield f"deploy/argocd: {name}: no ExternalSecret makes {secret} {key[server]}"


# --- Terraform ------------------------------------------------------------------------------------


def terraform_problems() -> Iterator[str]:
    """What terraform says of the modules."""
    terraform = shutil.which("terraform") or shutil.which("tofu")
    if terraform is None:
        print("  not run: terraform fmt, validate and test (it is not on PATH)")
        return
    formatted = _run([terraform, "fmt", "-check", "-recursive", ROOT / "deploy"], ROOT, {})
    if formatted.returncode:
        yield f"terraform fmt: {formatted.stdout}{formatted.stderr}"
    with schema_provider.serving_providers() as reattach, tempfile.TemporaryDirectory() as place:
        for module in MODULES:
            # A copy: what terraform leaves behind is nobody's.
            copied = Path(shutil.copytree(module, Path(place) / module.name))
            for command in (("init", "-backend=false", "-input=false"), ("validate",), ("test",)):
                done = _run(
                    [terraform, *command, "-no-color"], copied, {"TF_REATTACH_PROVIDERS": reattach}
                )
                if done.returncode:
                    yield f"terraform {command[0]}: {done.stdout}{done.stderr}"
                    break
                if command == ("test",):
                    if not re.search(r"Success! [1-9]\d* passed, 0 failed", done.stdout):
                        yield f"terraform test: ran no test: {done.stdout}"
                    print(f"== terraform, {module.name}: {done.stdout.strip().splitlines()[-1]}")
    print("  not run: terraform with AWS' own provider (its registry) and a plan of an account")


def _run(
    command: list[str | Path], place: Path, variables: dict[str, str]
) -> "subprocess.CompletedProcess[str]":
    """A tool without the caller's own configuration."""
    inherited = {name: text for name, text in os.environ.items() if not name.startswith("TF_")}
    return subprocess.run(
        command,
        cwd=place,
        env=inherited | {"CHECKPOINT_DISABLE": "1"} | variables,
        capture_output=True,
        text=True,
        timeout=TOOL_TIMEOUT_S,
        check=False,
    )


# --- workflows ------------------------------------------------------------------------------------


def workflow_problems() -> Iterator[str]:
    """What a workflow may do that it should not, or names that is not there."""
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([\w./]+):", makefile, re.MULTILINE))
    paths = sorted(WORKFLOWS.glob("*.yml"))
    if not paths:
        yield ".github/workflows: there are none"
    for path in paths:
        text = path.read_text("utf-8")
        for used in re.findall(r"^\s*(?:- )?uses: (.+)$", text, re.MULTILINE):
            if not re.fullmatch(r"\./\S+|[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", used):
                yield f"{path.name}: {used} is not pinned by a commit, with its version behind it"
        for said in re.findall(r"(?<![\w-])make ((?:[\w./]+(?: |$))+)", text, re.MULTILINE):
            for target in sorted(set(said.split()) - targets):
                yield f"{path.name}: there is no target {target}"
        workflow = yaml.safe_load(text)
        if workflow.get("permissions") != {"contents": "read"}:
            yield f"{path.name}: gives every job more than to read the contents"
        for name, job in workflow["jobs"].items():
            if "uses" not in job and "timeout-minutes" not in job:
                yield f"{path.name}: {name} may run for hours"
    yield from actionlint_problems(paths)


def actionlint_problems(paths: list[Path]) -> Iterator[str]:
    """What actionlint says."""
    actionlint = shutil.which("actionlint")
    if actionlint is None:
        print("  not run: actionlint (it is not on PATH)")
        return
    read = _run([actionlint, "-no-color", *paths], ROOT, {})
    if read.returncode:
        yield f"actionlint: {read.stdout}{read.stderr}"


# --- the whole ------------------------------------------------------------------------------------


def main() -> int:
    """Check everything; the exit status."""
    print("== Dockerfile, deploy/ and workflows")
    problems = list(dockerfile_problems(DOCKERFILE.read_text("utf-8")))
    with helm_python.Chart.load(chart_check.CHART) as chart:
        problems += argocd_problems(chart)
    problems += terraform_problems()
    problems += workflow_problems()
    for problem in problems:
        print(f"FAILED {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
