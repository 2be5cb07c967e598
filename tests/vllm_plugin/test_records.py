"""Records reach those who may read them, and only the groups they asked for."""

import json
import threading
import urllib.request
from urllib.error import HTTPError

import pytest

from renyi.errors import EngineError
from renyi.vllm.mixing import Record
from renyi.vllm.records import Broadcaster


@pytest.fixture
def broadcaster():
    made = Broadcaster("127.0.0.1", 0, "secret", {"rows": 8})
    yield made
    made.close()


def opened(broadcaster, query="", key="secret", path="/records"):
    request = urllib.request.Request(f"http://127.0.0.1:{broadcaster.port}{path}{query}")
    request.add_header("Authorization", f"Bearer {key}")
    return urllib.request.urlopen(request, timeout=10)


def test_a_reader_gets_its_own_groups(broadcaster):
    with opened(broadcaster, "?prefix=mine-") as stream:
        assert json.loads(stream.readline()) == {"rows": 8}
        sent = Record("mine-1", 4, [0.5, 0.5], 1.0, 0.75, 0.25, 0.5, [(3, -1.0)], [[(3, -1.5)], [(2, -0.5)]])
        broadcaster.tell([Record("other-1", 0), sent])
        broadcaster.tell([Record("mine-2", 0, broken="why")])
        first, second = (Record(**json.loads(stream.readline())) for _ in range(2))
    assert first._replace(alternatives=[(3, -1.0)], member_alternatives=[[(3, -1.5)], [(2, -0.5)]]) == sent
    assert (second.group, second.broken) == ("mine-2", "why")


@pytest.mark.parametrize(("key", "path", "status"), [("wrong", "/records", 401), ("secret", "/other", 404)])
def test_others_are_refused(broadcaster, key, path, status):
    with pytest.raises(HTTPError) as error:
        opened(broadcaster, key=key, path=path)
    assert error.value.code == status


def test_telling_never_waits():
    """With nobody there, and with a reader who does not read."""
    broadcaster = Broadcaster("127.0.0.1", 0, None, {})
    broadcaster.tell([Record("a", 0)])
    with broadcaster.reading("") as reader:
        reader.lines.maxsize = 2
        teller = threading.Thread(target=lambda: [broadcaster.tell([Record("a", n)]) for n in range(3)])
        teller.start()
        teller.join(10)
        assert not teller.is_alive()
        assert reader.is_lost
    broadcaster.close()


def test_a_port_that_is_taken(broadcaster):
    with pytest.raises(EngineError, match="--additional-config"):
        Broadcaster("127.0.0.1", broadcaster.port, None, {})
