"""Generates what callers need: `.proto` files, a descriptor set and typed Python stubs.

    python proto/stubgen.py OUT     writes OUT/include, OUT/python and OUT/descriptor_set.binpb

The wheel's build (`hatch_build.py`), `make proto` and the contract's checks (`check.py`) all take
this one way. It needs grpcio-tools, mypy-protobuf, protovalidate and googleapis-common-protos.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata, resources
from pathlib import Path

from google.protobuf import duration_pb2, field_mask_pb2, timestamp_pb2
from google.protobuf.compiler import plugin_pb2
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet

from descriptor_text import print_file, standard_dependencies

CONTRACT = "payments/v1"
"""The contract's package, as a path; also its Python import path."""
SERVICE_CONFIG = "payments/v1/service_config.json"
"""How clients should retry; gRPC's service config in JSON."""
VALIDATE_PROTO = "buf/validate/validate.proto"
DESCRIPTOR_SET = "descriptor_set.binpb"
"""A FileDescriptorSet of the contract with every import and with source info (comments)."""

# validate.proto imports these. The descriptor pool knows a file only once its module is loaded.
_WELL_KNOWN = (duration_pb2, field_mask_pb2, timestamp_pb2)
_IMPORT = re.compile(r'^import (?:public |weak )?"([^"]+)";', re.MULTILINE)
_PACKAGE_DOCSTRING = (
    '"""The payment gateway\'s contract, version 1: messages and service stubs."""\n'
)
_VALIDATE_HEADER = """\
// The rules that the contract's options use, printed from the descriptor that the Python package
// protovalidate {version} (Apache-2.0) ships: the same definitions, without their comments.
"""


class GenerationError(Exception):
    """The contract could not be compiled, or a tool did not do what was asked of it."""


def write_all(source: Path, out: Path) -> None:
    """Replaces `out/include`, `out/python` and `out/descriptor_set.binpb` by fresh ones.

    Args:
        source: the directory that holds `payments/v1/*.proto`.
        out: a directory, made where it does not exist.

    Raises:
        GenerationError: the contract does not compile.
    """
    out.mkdir(parents=True, exist_ok=True)
    # Made aside and moved into place at the end: a failure leaves the old ones as they were.
    with tempfile.TemporaryDirectory(prefix=".new-", dir=out) as scratch:
        fresh = Path(scratch)
        write_include(source, fresh / "include")
        image = compile_image(fresh / "include")
        (fresh / DESCRIPTOR_SET).write_bytes(image)
        write_python(fresh / "include", image, fresh / "python")
        for name in ("include", "python"):
            shutil.rmtree(out / name, ignore_errors=True)
            (fresh / name).replace(out / name)
        (fresh / DESCRIPTOR_SET).replace(out / DESCRIPTOR_SET)


def write_include(source: Path, include: Path) -> None:
    """Writes the contract's `.proto` files and all they import, except `google/protobuf/*`.

    With that directory as its only `--proto_path`, protoc compiles the contract: google/protobuf
    comes with protoc itself.

    Raises:
        GenerationError: there is no contract, or an import is not to be found.
    """
    pending = _contract_files(source)
    if not pending:
        msg = f"no {CONTRACT}/*.proto in {source}"
        raise GenerationError(msg)
    done: set[str] = set()
    while pending:
        name = pending.pop()
        if name in done or name.startswith("google/protobuf/"):
            continue
        done.add(name)
        text = _read_proto(source, name)
        target = include / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
        pending.extend(_IMPORT.findall(text))
    if (source / SERVICE_CONFIG).is_file():  # an earlier contract, to compare with, has none
        shutil.copyfile(source / SERVICE_CONFIG, include / SERVICE_CONFIG)


def compile_image(include: Path) -> bytes:
    """Compiles the contract below `include`; returns its FileDescriptorSet, serialized.

    It holds every import and the source info. It is also the image that buf reads.

    Raises:
        GenerationError: protoc found an error, which it printed; or the printed rules differ from
            those that protovalidate enforces.
    """
    with tempfile.TemporaryDirectory(prefix="contract-") as scratch:
        target = Path(scratch) / DESCRIPTOR_SET
        arguments = [f"--descriptor_set_out={target}", "--include_imports", "--include_source_info"]
        _protoc(include, [*arguments, *_contract_files(include)])
        image = target.read_bytes()
    _check_rules(image)
    return image


def write_python(include: Path, image: bytes, out: Path) -> None:
    """Writes the importable tree: modules, type stubs, the `.proto` files, the descriptor set.

    `payments` and `buf` get no `__init__.py`: they stay open to other distributions. The modules of
    google/* come from googleapis-common-protos.

    Raises:
        GenerationError: a generator failed.
    """
    out.mkdir(parents=True)
    descriptors = FileDescriptorSet.FromString(image)
    messages = [*_contract_files(include), VALIDATE_PROTO]
    services = [file.name for file in descriptors.file if file.service and file.name in messages]
    _protoc(include, [f"--python_out={out}", *messages])
    _protoc(include, [f"--grpc_python_out={out}", *services])
    _type_stubs("main", descriptors, messages, out)
    _type_stubs("grpc", descriptors, services, out)
    for name in messages:
        shutil.copyfile(include / name, out / name)
    shutil.copyfile(include / SERVICE_CONFIG, out / SERVICE_CONFIG)
    for package in {Path(name).parent for name in messages}:
        (out / package / "py.typed").touch()
    (out / CONTRACT / "__init__.py").write_text(_PACKAGE_DOCSTRING, encoding="utf-8")
    (out / CONTRACT / DESCRIPTOR_SET).write_bytes(image)


def _contract_files(root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in sorted(root.glob(f"{CONTRACT}/*.proto"))]


def _read_proto(source: Path, name: str) -> str:
    """Returns a file's text: the contract's, the rules', or one of googleapis-common-protos."""
    if name == VALIDATE_PROTO:
        rules = _rules()
        header = _VALIDATE_HEADER.format(version=metadata.version("protovalidate"))
        return header + print_file(rules, standard_dependencies(rules))
    if (source / name).is_file():
        return (source / name).read_text(encoding="utf-8")
    for file in metadata.files("googleapis-common-protos") or ():
        if file.as_posix() == name:
            return file.read_text(encoding="utf-8")
    msg = f'import "{name}": neither in {source} nor in googleapis-common-protos'
    raise GenerationError(msg)


def _rules() -> FileDescriptorProto:
    """Returns the descriptor of validate.proto that the installed protovalidate enforces.

    Its wheel carries no `.proto` file; the descriptor is reached through one of its messages.
    """
    from protovalidate import ViolationPb  # noqa: PLC0415 - native code, needed only here

    return FileDescriptorProto.FromString(ViolationPb.desc().file.proto.to_binary())


def _check_rules(image: bytes) -> None:
    """Holds the compiled text of validate.proto to the descriptor it was printed from."""
    for file in FileDescriptorSet.FromString(image).file:
        if file.name == VALIDATE_PROTO:
            file.ClearField("source_code_info")
            if file != _rules():
                msg = f"{VALIDATE_PROTO} lost something in print: extend descriptor_text.py"
                raise GenerationError(msg)


def _protoc(include: Path, arguments: list[str]) -> None:
    with resources.as_file(resources.files("grpc_tools") / "_proto") as well_known:
        paths = [f"--proto_path={include}", f"--proto_path={well_known}"]
        # -P: nothing in the current directory may stand in for a module of the environment.
        command = [sys.executable, "-P", "-m", "grpc_tools.protoc", *paths, *arguments]
        if subprocess.run(command, check=False).returncode != 0:
            msg = "protoc refused the contract; see its messages above"
            raise GenerationError(msg)


def _type_stubs(entry: str, descriptors: FileDescriptorSet, names: list[str], out: Path) -> None:
    """Runs mypy-protobuf's plugin `entry` (main: messages, grpc: services) over the files `names`.

    We speak the plugin protocol ourselves: protoc takes a plugin only as an executable, and a
    console script is none on every system, nor in every environment that pip builds in.
    """
    request = plugin_pb2.CodeGeneratorRequest(
        file_to_generate=names, parameter="quiet", proto_file=descriptors.file
    )
    code = f"from mypy_protobuf.main import {entry}; {entry}()"
    ran = subprocess.run(
        [sys.executable, "-P", "-c", code],
        input=request.SerializeToString(),
        stdout=subprocess.PIPE,
        check=False,
    )
    response = plugin_pb2.CodeGeneratorResponse.FromString(ran.stdout)
    if ran.returncode != 0 or response.error or not response.file:
        msg = f"mypy-protobuf ({entry}) failed: {response.error or 'see its messages above'}"
        raise GenerationError(msg)
    for file in response.file:
        (out / file.name).write_text(file.content, encoding="utf-8")


def _main() -> int:
    summary = (__doc__ or "").split("\n\n", maxsplit=1)[0]
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("out", type=Path, help="the directory to write to")
    arguments = parser.parse_args()
    try:
        write_all(Path(__file__).resolve().parent, arguments.out)
    except GenerationError as error:
        print(f"stubgen: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main())
