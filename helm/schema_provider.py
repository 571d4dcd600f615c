"""Terraform's providers by their schemas alone, so that a module is checked without a registry.

Serves schemas.json over Terraform's plugin protocol: enough for `terraform validate`, and for
`terraform test` with mocked providers, which make no call of their own. It knows names, types and
what is required, not what AWS thinks of a value.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import grpc

TERRAFORM: Final = Path(__file__).parents[1] / "deploy" / "terraform"
SCHEMAS: Final = TERRAFORM / "schemas.json"
PROTOCOL_VERSION: Final = 6
THREADS: Final = 4
_NESTING: Final = {"single": 1, "list": 2, "set": 3, "map": 4}

Table = dict[str, Any]


@contextlib.contextmanager
def serving_providers() -> Iterator[str]:
    """The value of TF_REATTACH_PROVIDERS for as long as the providers are served."""
    tables: Table = json.loads(SCHEMAS.read_text("utf-8"))
    servers = []
    reattach = {}
    messages, services = _stubs()
    try:
        for name, table in tables.items():
            server = grpc.server(ThreadPoolExecutor(THREADS))
            services.add_ProviderServicer_to_server(_provider(messages, services, table), server)
            port = server.add_insecure_port("127.0.0.1:0")
            server.start()
            servers.append(server)
            reattach[name] = {
                "Protocol": "grpc",
                "ProtocolVersion": PROTOCOL_VERSION,
                "Pid": os.getpid(),
                "Test": True,
                "Addr": {"Network": "tcp", "String": f"127.0.0.1:{port}"},
            }
        yield json.dumps(reattach)
    finally:
        for server in servers:
            server.stop(None).wait()


def _stubs() -> tuple[Any, Any]:
    """The modules of provider.proto."""
    with tempfile.TemporaryDirectory() as directory:
        places = [f"-I{TERRAFORM}", f"--python_out={directory}", f"--grpc_python_out={directory}"]
        subprocess.run(
            [sys.executable, "-m", "grpc_tools.protoc", *places, TERRAFORM / "provider.proto"],
            check=True,
        )
        sys.path.insert(0, directory)
        try:
            return import_module("provider_pb2"), import_module("provider_pb2_grpc")
        finally:
            sys.path.remove(directory)


def _provider(messages: Any, services: Any, table: Table) -> Any:
    schemas = messages.Schemas(
        provider=_schema(messages, {"attributes": {"region": "string, optional"}})
    )
    for kind, into in (
        ("resources", schemas.resource_schemas),
        ("data_sources", schemas.data_source_schemas),
    ):
        for name, block in table[kind].items():
            into[name].CopyFrom(_schema(messages, block))

    class Provider(services.ProviderServicer):  # type: ignore[misc]  # generated, untyped
        """Every method answers that all is well."""

        def GetProviderSchema(self, _request: Any, _context: Any) -> Any:  # noqa: N802
            return schemas

        def ValidateProviderConfig(self, _request: Any, _context: Any) -> Any:  # noqa: N802
            return messages.Empty()

        def StopProvider(self, _request: Any, _context: Any) -> Any:  # noqa: N802
            return messages.Stopped()

        ValidateResourceConfig = ValidateProviderConfig
        ValidateDataResourceConfig = ValidateProviderConfig
        ConfigureProvider = ValidateProviderConfig

    return Provider()


def _schema(messages: Any, block: Table) -> Any:
    return messages.Schema(block=_block(messages, block))


def _block(messages: Any, block: Table) -> Any:
    attributes = []
    for name, text in block["attributes"].items():
        kind, _, modes = text.partition(", ")
        collection, _, element = kind.partition(" of ")
        attributes.append(
            messages.Schema.Attribute(
                name=name,
                type=json.dumps([collection, element] if element else kind).encode(),
                **dict.fromkeys(modes.split(), True),
            )
        )
    nested = [
        messages.Schema.NestedBlock(
            type_name=name,
            block=_block(messages, inner),
            nesting=_NESTING[inner["nesting"]],
            min_items=inner["min"] if inner["nesting"] != "single" else 0,
            max_items=inner["max"],
        )
        for name, inner in block.get("blocks", {}).items()
    ]
    return messages.Schema.Block(attributes=attributes, block_types=nested)
