"""`gateway verify`: an audit, its progress on the standard error, its findings as a table."""

import tempfile
from contextlib import ExitStack
from pathlib import Path

import click

from gateway.application.administration import AdminFilter
from gateway.application.verification import Audit, AuditStore, Progress, Summary
from gateway.connectors.simulator.book import JournalBook
from gateway.domain.invariants import Finding
from gateway.rpc.decoding import ContractDecoder


async def verify_all(store: AuditStore, filter_: AdminFilter, journal: Path | None) -> bool:
    """Audit, and print what is found; whether every rule holds.

    Raises GatewayError where the store is away, JournalError and OSError.
    """
    with ExitStack() as stack:
        book = None
        if journal is not None:
            scratch = Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="gateway-verify-"))
            )
            book = stack.enter_context(JournalBook(journal, scratch / "book.sqlite"))
        async for each in Audit(store, ContractDecoder(), filter_, book).run():
            match each:
                case Progress():
                    click.echo(f"{each.payments} payments, {each.findings} findings", err=True)
                case Finding():
                    where = (each.merchant_id, each.payment_id, each.operation_id)
                    click.echo(f"{each.kind}  {'  '.join(filter(None, where))}  {each.detail}")
                case Summary():
                    _tell(each)
                    return not each.findings
    raise AssertionError("an audit ends with its summary")


def _tell(summary: Summary) -> None:
    for kind, count in sorted(summary.by_kind.items()):
        click.echo(f"{count:>8}  {kind}")
    click.echo(f"{summary.findings:>8}  findings in {summary.payments} payments")
