"""The stubs' distribution: what a calling service installs holds all it needs, and is typed."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet

ROOT = Path(__file__).resolve().parents[2]
PROTO = ROOT / "proto"
PROTO_NAMES = sorted(p.relative_to(PROTO).as_posix() for p in PROTO.glob("payments/v1/*.proto"))
LOCKS = ("requirements.lock", "requirements-bench.lock", "requirements-chart.lock")

CLIENT = '''\
"""A service that authorizes a payment, as a caller would write it."""

import grpc
import grpc.aio
from payments.v1 import money_pb2, payment_method_pb2, payment_service_pb2, payment_service_pb2_grpc


async def authorize(channel: grpc.aio.Channel) -> str:
    """Returns the payment's id."""
    stub = payment_service_pb2_grpc.PaymentServiceStub(channel)
    answer = await stub.AuthorizePayment(
        payment_service_pb2.AuthorizePaymentRequest(
            idempotency_key="order-1",
            amount=money_pb2.Money(amount_minor=1050, currency_code="EUR"),
            capture_method=payment_method_pb2.CAPTURE_METHOD_MANUAL,
            payment_method=payment_method_pb2.PaymentMethod(token="tok_1"),
        ),
        timeout=10,
    )
    return answer.payment.payment_id


def read(channel: grpc.Channel) -> str:
    """Returns the payment's id, from a caller without asyncio."""
    stub = payment_service_pb2_grpc.PaymentServiceStub(channel)
    request = payment_service_pb2.GetPaymentRequest(payment_id="pay_1")
    return stub.GetPayment(request, timeout=10).payment.payment_id


async def error_code(stub: "payment_service_pb2_grpc.PaymentServiceAsyncStub") -> int:
    """Returns the status of the first item of a batch."""
    request = payment_service_pb2.BatchAuthorizePaymentsRequest()
    return (await stub.BatchAuthorizePayments(request)).results[0].error.code


class Servicer(payment_service_pb2_grpc.PaymentServiceServicer):
    """A test double of the gateway."""

    async def GetPayment(
        self,
        request: payment_service_pb2.GetPaymentRequest,
        context: grpc.aio.ServicerContext[
            payment_service_pb2.GetPaymentRequest, payment_service_pb2.GetPaymentResponse
        ],
    ) -> payment_service_pb2.GetPaymentResponse:
        return payment_service_pb2.GetPaymentResponse()
'''
MYPY_SETTINGS = """\
[mypy]
strict = true
[mypy-google.rpc.*]
follow_untyped_imports = true
"""


def _run(*arguments: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def _build(kind: str, source: Path, out: Path) -> Path:
    """Builds as pip does, through the build backend, with the generators of this environment."""
    code = f"import hatchling.build; print(hatchling.build.build_{kind}({str(out)!r}))"
    ran = _run("-c", code, cwd=source)
    assert ran.returncode == 0, ran.stderr
    return out / ran.stdout.splitlines()[-1]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build("wheel", PROTO, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the installed wheel and nothing else, at a path with a space."""
    target = tmp_path_factory.mktemp("a site")
    pip = ["-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    ran = _run(*pip, "--no-deps", "--no-index", "--target", target, wheel, cwd=target)
    assert ran.returncode == 0, ran.stderr
    return target


def test_wheel_holds_the_contract_for_every_language_and_the_typed_modules(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    messages = [*PROTO_NAMES, "buf/validate/validate.proto"]
    wanted = {*messages, "payments/v1/descriptor_set.binpb", "payments/v1/py.typed"}
    wanted.add("payments/v1/service_config.json")
    for name in messages:
        stem = name.removesuffix(".proto")
        wanted |= {f"{stem}_pb2.py", f"{stem}_pb2.pyi"}
    wanted |= {f"payments/v1/payment_service_pb2_grpc.{suffix}" for suffix in ("py", "pyi")}
    assert wanted <= names


def test_wheel_leaves_shared_namespaces_to_others(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert not [name for name in names if name.startswith("google/")]
    assert not {"payments/__init__.py", "buf/__init__.py", "buf/validate/__init__.py"} & names


def test_wheel_from_the_source_distribution_is_the_same(wheel: Path, tmp_path: Path) -> None:
    sdist = _build("sdist", PROTO, tmp_path)
    assert _run("-m", "tarfile", "-e", sdist, tmp_path, cwd=tmp_path).returncode == 0
    (unpacked,) = (path for path in tmp_path.iterdir() if path.is_dir())
    again = _build("wheel", unpacked, tmp_path)
    with zipfile.ZipFile(again) as one, zipfile.ZipFile(wheel) as other:
        contents = [{name: z.read(name) for name in z.namelist()} for z in (one, other)]
    assert contents[0] == contents[1]


def test_installed_stubs_import_and_speak_the_contract(installed: Path) -> None:
    code = (
        "from payments.v1 import payment_service_pb2 as m, payment_service_pb2_grpc as g;"
        "import grpc; g.PaymentServiceStub(grpc.insecure_channel('127.0.0.1:1'));"
        "service = m.DESCRIPTOR.services_by_name['PaymentService'];"
        "print(m.__file__, *(method.name for method in service.methods))"
    )
    ran = _run("-c", code, cwd=installed, PYTHONPATH=str(installed))
    assert ran.returncode == 0, ran.stderr
    assert str(installed) in ran.stdout
    assert {"AuthorizePayment", "StreamAuthorizePayments"} <= set(ran.stdout.split())


def test_descriptor_set_is_complete_and_keeps_the_comments(installed: Path) -> None:
    data = (installed / "payments/v1/descriptor_set.binpb").read_bytes()
    files = {file.name: file for file in FileDescriptorSet.FromString(data).file}
    assert set(PROTO_NAMES) <= set(files)
    for file in files.values():
        assert set(file.dependency) <= set(files)
    service = files["payments/v1/payment_service.proto"]
    comments = [place.leading_comments for place in service.source_code_info.location]
    assert any("Idempotency" in comment for comment in comments)


def test_a_strictly_typed_client_passes_and_a_wrong_field_fails(
    installed: Path, tmp_path: Path
) -> None:
    (tmp_path / "mypy.ini").write_text(MYPY_SETTINGS, encoding="utf-8")
    (tmp_path / "client.py").write_text(CLIENT, encoding="utf-8")
    wrong = CLIENT.replace("amount_minor=1050", "amount_minor='10.50'")
    wrong = wrong.replace("answer.payment.payment_id", "answer.payment.id")
    (tmp_path / "wrong.py").write_text(wrong, encoding="utf-8")
    mypy = ["-m", "mypy", "--config-file=mypy.ini", f"--cache-dir={tmp_path / 'cache'}"]
    right = _run(*mypy, "client.py", cwd=tmp_path, MYPYPATH=str(installed))
    assert right.returncode == 0, right.stdout
    failed = _run(*mypy, "wrong.py", cwd=tmp_path, MYPYPATH=str(installed))
    assert failed.returncode == 1, failed.stdout
    assert "amount_minor" in failed.stdout
    assert '"Payment" has no attribute "id"' in failed.stdout


def test_stub_of_an_aio_channel_is_typed_asynchronous(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "mypy.ini").write_text(MYPY_SETTINGS, encoding="utf-8")
    (tmp_path / "client.py").write_text(CLIENT.replace("await stub.Auth", "stub.Auth"))
    ran = _run(
        *["-m", "mypy", "--config-file=mypy.ini", f"--cache-dir={tmp_path / 'cache'}"],
        "client.py",
        cwd=tmp_path,
        MYPYPATH=str(installed),
    )
    assert "UnaryUnaryCall" in ran.stdout


def test_protoc_compiles_what_make_proto_writes_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "for others"
    assert _run(PROTO / "stubgen.py", out, cwd=tmp_path).returncode == 0
    include = out / "include"
    image = tmp_path / "image.binpb"
    # No search path of another distribution: google/protobuf/* is inside protoc's own package.
    ran = _run(
        *["-P", "-m", "grpc_tools.protoc", f"--proto_path={include}"],
        *[f"--descriptor_set_out={image}", *PROTO_NAMES],
        cwd=tmp_path,
    )
    assert ran.returncode == 0, ran.stderr
    compiled = FileDescriptorSet.FromString(image.read_bytes())
    assert sorted(file.name for file in compiled.file) == PROTO_NAMES
    shipped = out / "python/payments/v1/descriptor_set.binpb"
    assert shipped.read_bytes() == (out / "descriptor_set.binpb").read_bytes()


def test_printed_rules_are_those_that_protovalidate_enforces(installed: Path) -> None:
    from protovalidate import ViolationPb  # noqa: PLC0415 - native code, for this test alone

    data = (installed / "payments/v1/descriptor_set.binpb").read_bytes()
    (rules,) = (
        file
        for file in FileDescriptorSet.FromString(data).file
        if file.name == "buf/validate/validate.proto"
    )
    rules.ClearField("source_code_info")
    enforced = type(rules).FromString(ViolationPb.desc().file.proto.to_binary())
    assert rules == enforced


def test_generators_are_those_of_the_lock() -> None:
    """`pip install ./proto` elsewhere and `make setup` here generate the same stubs."""
    project = tomllib.loads((PROTO / "pyproject.toml").read_text(encoding="utf-8"))
    for requirement in project["build-system"]["requires"]:
        name, version = requirement.split("==")
        assert importlib.metadata.version(name) == version, requirement


def test_floors_of_the_stubs_are_what_the_generated_code_demands(installed: Path) -> None:
    project = tomllib.loads((PROTO / "pyproject.toml").read_text(encoding="utf-8"))
    stated = "\n".join(project["project"]["dependencies"])
    floors = dict(re.findall(r"^([a-z-]+)>=([0-9.]+)", stated, re.MULTILINE))
    directory = installed / "payments/v1"
    messages = (directory / "payment_service_pb2.py").read_text(encoding="utf-8")
    services = (directory / "payment_service_pb2_grpc.py").read_text(encoding="utf-8")
    assert f"Protobuf Python Version: {floors['protobuf']}\n" in messages
    assert f"GRPC_GENERATED_VERSION = '{floors['grpcio']}'" in services


@pytest.mark.parametrize("name", LOCKS)
def test_lock_pins_every_package_with_hashes_and_names_no_place(name: str) -> None:
    lock = (ROOT / name).read_text(encoding="utf-8")
    assert "://" not in lock
    assert not re.search(r"^(--?[a-z]|/|\.)", lock, re.MULTILINE)
    pinned = re.findall(r"^([a-z0-9][a-z0-9._-]*)==", lock, re.MULTILINE)
    blocks = re.split(r"^(?=[a-z0-9])", lock, flags=re.MULTILINE)[1:]
    assert len(blocks) == len(pinned) == len(set(pinned))
    assert all("--hash=sha256:" in block for block in blocks)


def test_locks_satisfy_what_the_projects_ask_for() -> None:
    lock = "".join((ROOT / name).read_text(encoding="utf-8") for name in LOCKS)
    pinned = set(re.findall(r"^([a-z0-9._-]+)==", lock, re.MULTILINE))
    wanted: list[str] = []
    for directory in (ROOT, PROTO):
        project = tomllib.loads((directory / "pyproject.toml").read_text(encoding="utf-8"))
        wanted += project["project"]["dependencies"]
        wanted += project["build-system"]["requires"]
        for group in project.get("dependency-groups", {}).values():
            wanted += [requirement for requirement in group if isinstance(requirement, str)]
    names = {re.split(r"[<>=~! \[;]", requirement)[0].replace("_", "-") for requirement in wanted}
    assert names - {"payment-gateway-stubs"} <= pinned
