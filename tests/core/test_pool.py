"""What layers share: made once, held by count, destroyed together and in order."""

from __future__ import annotations

import gc
import weakref

from moe_core.pool import SharedPool


class Layer:
    def __init__(self, pool, owner, key):
        lease = pool.lease(owner, key, lambda: f"{owner}:{key}")
        self.item = lease.item
        self.keep = lease.keep
        weakref.finalize(self, lease.close)


def test_items_are_made_once_and_go_together_the_youngest_first():
    ended = []
    pool = SharedPool(ended.append)
    layers = [Layer(pool, "rank 0", key) for key in ("a", "b", "a")]
    other = Layer(pool, "rank 1", "a")
    assert [layer.item for layer in layers] == ["rank 0:a", "rank 0:b", "rank 0:a"]
    assert (pool.has("rank 0", "b"), pool.has("rank 1", "b")) == (True, False)
    del layers[1:]
    gc.collect()
    assert not ended, "b is held by nobody, and goes with a"
    layers.clear()
    gc.collect()
    assert ended == ["rank 0:b", "rank 0:a"]
    assert not pool.has("rank 0", "a")
    del other
    gc.collect()
    assert ended[2:] == ["rank 1:a"]


def test_what_a_graph_was_captured_over_stays_until_the_end():
    ended = []
    pool = SharedPool(ended.append)
    layer = Layer(pool, "rank", "a")
    layer.keep()
    del layer
    gc.collect()
    assert not ended
    again = Layer(pool, "rank", "a")
    pool.close()
    assert ended == ["rank:a"]
    del again
    gc.collect()
    assert ended == ["rank:a"], "once"


def test_a_lease_is_given_back_once():
    ended = []
    pool = SharedPool(ended.append)
    first, second = (pool.lease("rank", "a", object) for _ in range(2))
    first.close()
    first.close()
    assert not ended
    second.close()
    assert len(ended) == 1


def test_an_item_that_could_not_be_made_leaves_nothing_behind():
    pool = SharedPool(lambda item: None)

    def fails():
        raise OSError("no memory")

    for _ in range(2):
        try:
            pool.lease("rank", "a", fails)
        except OSError:
            continue
        raise AssertionError("the error is the caller's")
    assert not pool.has("rank", "a")
