"""The durable store: PostgreSQL through asyncpg, written in batches.

`storage.postgres.migrate` brings a database up to the schema that this version needs.
"""

from storage.postgres.accounts import Accounts, KeyRow, MerchantRow, OrganisationRow
from storage.postgres.changes import ConfigurationChanges, unrecorded_tables
from storage.postgres.connector_accounts import ConnectorAccounts
from storage.postgres.errors import NotDurable, RowRefused, SchemaError
from storage.postgres.events import OutboxEvents
from storage.postgres.lanes import LaneLimits
from storage.postgres.migrate import check_schema, required_version
from storage.postgres.notifications import Notifications
from storage.postgres.pool import (
    NO_STANDBY,
    connect_once,
    durability,
    durability_problems,
    has_standby,
    system_generation,
)
from storage.postgres.routing import RoutingRules
from storage.postgres.routing_controls import RoutingControls
from storage.postgres.store import PostgresStore, open_reader

__all__ = [
    "NO_STANDBY",
    "Accounts",
    "ConfigurationChanges",
    "ConnectorAccounts",
    "KeyRow",
    "LaneLimits",
    "MerchantRow",
    "NotDurable",
    "Notifications",
    "OrganisationRow",
    "OutboxEvents",
    "PostgresStore",
    "RoutingControls",
    "RoutingRules",
    "RowRefused",
    "SchemaError",
    "check_schema",
    "connect_once",
    "durability",
    "durability_problems",
    "has_standby",
    "open_reader",
    "required_version",
    "system_generation",
    "unrecorded_tables",
]
