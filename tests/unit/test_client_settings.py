"""The arguments of both clients, stated once."""

import inspect
from pathlib import Path

import pytest

from plait.client import AsyncClient, Client, ClientSettings
from plait.client.settings import SubAccountLimits
from plait.client.sub_accounts import order_sub_account
from plait.errors import ConfigError

NOWHERE = "/nonexistent/network.toml"


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_setting_that_is_not_there_is_named_before_anything_is_read(
    kind: type[Client | AsyncClient],
) -> None:
    unknown = {"hots": "0:2"}
    with pytest.raises(TypeError, match="no setting hots"):
        kind(NOWHERE, **unknown)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_network_file_that_is_not_there(kind: type[Client | AsyncClient]) -> None:
    with pytest.raises(ConfigError, match="network"):
        kind(NOWHERE, audits=False)


def test_every_setting_is_read() -> None:
    source = Path(inspect.getfile(AsyncClient)).read_text()
    for name in ClientSettings.__annotations__:
        assert f'settings.get("{name}"' in source


def test_the_limits_of_a_sub_account_are_those_of_the_order() -> None:
    signature = inspect.signature(order_sub_account)
    keywords = {one.name for one in signature.parameters.values() if one.kind is one.KEYWORD_ONLY}
    assert keywords == SubAccountLimits.__annotations__.keys()
