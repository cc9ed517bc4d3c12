"""When a settlement that the ledger refused is worth presenting again. Pure."""

RESERVATION_WAIT_MS = 600_000
"""How long a settlement waits for the reservation that pays it."""
_UNRESERVED = ("payee", "session", "cap")


def may_still_be_paid(
    refusal: str, issued_ms: int, now_ms: int, wait_ms: int = RESERVATION_WAIT_MS
) -> bool:
    """Whether what is missing may still come.

    A stage that entered by a reroute starts on a reservation that its client is only about
    to bring to the ledger. That of an earlier stint may even come after that of a later one:
    then the voucher is beyond the cap for a moment.
    """
    code = refusal.partition("refuses: ")[2].partition(":")[0]
    return code in _UNRESERVED and now_ms < issued_ms + wait_ms
