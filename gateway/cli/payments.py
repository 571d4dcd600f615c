"""Commands that look at payments."""

import click

from gateway.cli.common import coroutine, fail, merchant_option, postgres_dsn, read_settings


@click.group()
def payments() -> None:
    """Look at payments in the database."""


@payments.command("show")
@click.argument("payment_id")
@merchant_option
@coroutine
async def payments_show(payment_id: str, merchant: str) -> None:
    """Print a payment, its operations and their attempts as JSON."""
    from google.protobuf.json_format import MessageToJson
    from payments.v1.payment_service_pb2 import GetPaymentResponse

    from gateway.rpc.conversion import encode_aggregate
    from storage.postgres import open_reader

    async with open_reader(postgres_dsn(read_settings())) as store:
        aggregate = await store.load(merchant, payment_id)
    if aggregate is None:
        fail(f"The merchant {merchant} has no payment {payment_id}.")
    shown = GetPaymentResponse.FromString(encode_aggregate(aggregate))
    click.echo(MessageToJson(shown, preserving_proto_field_name=True))
