import socket

import pytest

from qlora_exp.cli.ports import require_free
from qlora_exp.utils.errors import ConfigError


@pytest.mark.parametrize("port", ["taken", 99999999])
def test_a_port_that_cannot_be_had_is_explained(port):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1] if port == "taken" else port
        with pytest.raises(ConfigError, match="choose another: --port"):
            require_free("127.0.0.1", number)


def test_a_free_port_is_accepted():
    with socket.create_server(("127.0.0.1", 0)) as free:
        number = free.getsockname()[1]
    require_free("127.0.0.1", number)
