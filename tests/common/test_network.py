"""Addresses of pages: what can be bound, and which host names are answered."""

import pytest

from imagen_jax.common import network
from imagen_jax.common.errors import UserError


def test_a_port_in_use_and_a_foreign_host_are_one_line_errors():
    bound = network.listen("127.0.0.1", 0)
    port = bound.getsockname()[1]
    with pytest.raises(
        UserError, match=rf"--port is {port}, which is in use; try --port={port + 1}"
    ):
        network.listen("127.0.0.1", port)
    bound.close()
    with pytest.raises(UserError, match=r"--host is 'no\.invalid'; it cannot be resolved"):
        network.listen("no.invalid", 0)
    with pytest.raises(UserError, match=r"--host=192\.0\.2\.1 --port=0 cannot be used"):
        network.listen("192.0.2.1", 0)  # an address for documentation, which no machine has


def test_urls():
    bound = network.listen("127.0.0.1", 0)
    port = bound.getsockname()[1]
    assert network.url("127.0.0.1", bound) == f"http://127.0.0.1:{port}"
    assert network.url("::1", bound) == f"http://[::1]:{port}"
    bound.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.0.0.2"])
def test_a_loopback_address_answers_to_this_machine_only(host):
    assert {"localhost", host} <= set(network.allowed_hosts(host)) - {"*"}


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "rate.example"])
def test_other_addresses_answer_to_any_name(host):
    assert network.allowed_hosts(host) == ["*"]
