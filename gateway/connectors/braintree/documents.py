"""The GraphQL documents that are sent to Braintree.

Source: Braintree's published schema and GraphQL reference. Each document is valid against the part
of the schema in `tests/braintree_schema.graphql`.
"""

from typing import Final

_COMMON: Final = """
fragment Money on MonetaryAmount { value currencyCode }
fragment Processor on TransactionAuthorizationProcessorResponse {
  legacyCode
  message
  cvvResponse
  avsPostalCodeResponse
  avsStreetAddressResponse
  authorizationId
  retrievalReferenceNumber
}
fragment Event on PaymentStatusEvent {
  __typename
  status
  amount { ...Money }
  ... on AuthorizedEvent {
    authorizationExpiresAt
    processorResponse { ...Processor }
    networkResponse { code }
  }
  ... on ProcessorDeclinedEvent {
    declineType
    processorResponse { ...Processor }
    networkResponse { code }
    merchantAdviceCodeResponse { code }
  }
  ... on GatewayRejectedEvent {
    gatewayRejectionReason
    processorResponse { ...Processor }
    networkResponse { code }
    merchantAdviceCodeResponse { code }
    duplicateOf { id orderId }
  }
  ... on FailedEvent {
    processorResponse { ...Processor }
    networkResponse { code }
    merchantAdviceCodeResponse { code }
  }
  ... on SettlementDeclinedEvent { processorResponse { legacyCode message } }
}
"""

_CHARGE: Final = """
fragment Charged on Transaction {
  __typename
  id
  orderId
  status
  amount { ...Money }
  statusHistory { ...Event }
  paymentMethodSnapshot {
    __typename
    ... on CreditCardTransactionDetails {
      networkTransactionId
      acquirerReferenceNumber
      creditCard { brandCode }
    }
  }
}
"""

_REFUND: Final = """
fragment Returned on Refund {
  __typename
  id
  orderId
  status
  amount { ...Money }
  refundedTransaction { id }
  statusHistory { ...Event }
}
"""

_PARTIAL: Final = """
fragment Whole on Transaction {
  ...Charged
  refunds { ...Returned }
  partialCaptureDetails {
    __typename
    ... on ParentAuthorization {
      totalAmountAuthorized { ...Money }
      childCaptures { ...Charged refunds { ...Returned } }
    }
  }
}
"""

_VERIFICATION: Final = """
fragment Verified on Verification {
  __typename
  id
  status
  gatewayRejectionReason
  networkResponse { code }
  processorResponse {
    legacyCode
    message
    cvvResponse
    avsPostalCodeResponse
    avsStreetAddressResponse
  }
}
"""


def _creating(mutation: str, input_type: str) -> str:
    return (
        f"mutation Send($input: {input_type}!) {{ {mutation}(input: $input) "
        f"{{ clientMutationId transaction {{ ...Charged }} }} }}{_COMMON}{_CHARGE}"
    )


AUTHORIZE: Final = _creating("authorizePaymentMethod", "AuthorizePaymentMethodInput")
CHARGE: Final = _creating("chargePaymentMethod", "ChargePaymentMethodInput")
AUTHORIZE_CARD: Final = _creating("authorizeCreditCard", "AuthorizeCreditCardInput")
CHARGE_CARD: Final = _creating("chargeCreditCard", "ChargeCreditCardInput")
CAPTURE: Final = _creating("captureTransaction", "CaptureTransactionInput")
VOID: Final = _creating("voidTransaction", "VoidTransactionInput")
PARTIAL_CAPTURE: Final = (
    "mutation Send($input: PartialCaptureTransactionInput!) { partialCaptureTransaction"
    "(input: $input) { clientMutationId capture { ...Charged partialCaptureDetails { __typename "
    "... on ChildCapture { parentAuthorization { id } } } } } }" + _COMMON + _CHARGE
)
REFUND: Final = (
    "mutation Send($input: RefundTransactionInput!) { refundTransaction(input: $input) "
    "{ clientMutationId refund { ...Returned } } }" + _COMMON + _REFUND
)
VERIFY: Final = (
    "mutation Send($input: VerifyPaymentMethodInput!) { verifyPaymentMethod(input: $input) "
    "{ clientMutationId verification { ...Verified } } }" + _VERIFICATION
)

TRANSACTION: Final = (
    "query Read($id: ID!) { node(id: $id) { __typename id ...Whole } }"
    + _COMMON
    + _CHARGE
    + _REFUND
    + _PARTIAL
)
VERIFICATION: Final = (
    "query Read($id: ID!) { node(id: $id) { __typename id ...Verified } }" + _VERIFICATION
)
SEARCH: Final = (
    "query Search($input: TransactionSearchInput!, $first: Int!) { search "
    "{ transactions(input: $input, first: $first) { pageInfo { hasNextPage } "
    "edges { node { ...Whole } } } } }" + _COMMON + _CHARGE + _REFUND + _PARTIAL
)
