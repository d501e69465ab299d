"""Block tables of several cache groups as one list, and which of their blocks are loaded and stored."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lmcache_rs.connector.groups import Groups
from lmcache_rs.connector.requests import follow_tables

ONE = Groups(4)
MIXED = Groups(4, (0, 6))
"""One group that keeps everything, and one whose attention sees 6 tokens, itself included."""


def test_one_group_is_left_as_it_is() -> None:
    assert ONE.plain
    assert ONE.table(([5, 6],)) == [5, 6]
    assert ONE.rows(np.array([3, 4], np.uint32)).tolist() == [3, 4]
    assert ONE.incomplete([0, 5]) == 0


def test_tables_side_by_side_and_their_rows() -> None:
    assert not MIXED.plain
    assert not Groups(4, (6,)).plain
    assert MIXED.table(([1, 2, 3], [0, 8, 9])) == [1, 0, 2, 8, 3, 9]
    assert MIXED.table(()) == []
    rows = MIXED.rows(np.array([3, 0], np.uint32))
    assert (rows.tolist(), rows.dtype) == ([6, 7, 0, 1], np.uint32)
    table = [1, 7]
    MIXED.extend(table, ([2], [8]))
    assert table == [1, 7, 2, 8]
    with pytest.raises(ValueError, match=r"grew by \[2, 1\]"):
        MIXED.extend(table, ([3, 4], [9]))
    assert table == [1, 7, 2, 8]


@pytest.mark.parametrize(
    ("computed", "positions"),
    # With 9 tokens computed the next one, the tenth, sees tokens 4 to 9: the first block is out of its window.
    [(0, 0), (5, 0), (8, 0), (9, 1), (12, 1), (13, 2), (1000, 248)],
)
def test_what_leaves_the_window(computed: int, positions: int) -> None:
    assert MIXED.out_of_window(1, computed) == positions
    assert MIXED.out_of_window(0, computed) == 0


def test_blocks_out_of_the_window_are_forgotten() -> None:
    table = [1, 11, 2, 12, 3, 13]
    MIXED.forget_out_of_window(table, 13)
    assert table == [1, 0, 2, 0, 3, 13]
    assert MIXED.incomplete(table) == 2
    MIXED.forget_out_of_window(table, 1000)
    assert table == [1, 0, 2, 0, 3, 0]
    assert MIXED.incomplete([1, 11]) == 0


def test_the_blocks_of_a_hit() -> None:
    table = MIXED.table(([1, 2, 3, 4], [0, 0, 13, 14]))
    assert MIXED.to_load(table, 0, 13).tolist() == [1, 0, 2, 0, 3, 13, 4, 14]
    assert MIXED.to_load(table, 3, 13).tolist() == [4, 14]
    with pytest.raises(LookupError, match="group 1"):  # the next token sees the second block
        MIXED.to_load(table, 0, 12)
    with pytest.raises(LookupError, match="group 0"):
        MIXED.to_load(MIXED.table(([1, 0, 3, 4], [0, 0, 13, 14])), 0, 13)
    with pytest.raises(LookupError, match="the table has 4"):
        MIXED.to_load(table, 0, 17)


def record() -> Any:
    return SimpleNamespace(table=[], gap=True)


def scheduled(new: Any = (), **cached: Any) -> Any:
    lists = {"req_ids": [], "resumed_req_ids": (), "new_block_ids": [], "num_computed_tokens": []}
    return SimpleNamespace(scheduled_new_reqs=new, scheduled_cached_reqs=SimpleNamespace(**(lists | cached)))


def test_tables_are_followed_through_chunks_and_a_resumption() -> None:
    storing = {"a": record()}
    first = SimpleNamespace(req_id="a", block_ids=([1, 2], [11, 12]), num_computed_tokens=0)
    assert follow_tables(storing, scheduled([first]), MIXED) == {"a": 0}
    assert (storing["a"].table, storing["a"].gap) == ([1, 11, 2, 12], False)
    step = scheduled(req_ids=["a"], new_block_ids=[([3], [13])], num_computed_tokens=[9])
    assert follow_tables(storing, step, MIXED) == {"a": 9}
    assert storing["a"].table == [1, 0, 2, 12, 3, 13]
    step = scheduled(req_ids=["a"], new_block_ids=[None], num_computed_tokens=[13])
    follow_tables(storing, step, MIXED)
    assert storing["a"].table == [1, 0, 2, 0, 3, 13]
    storing["a"].gap = True
    step = scheduled(
        req_ids=["a"], resumed_req_ids={"a"}, new_block_ids=[([4, 5], [14, 15])], num_computed_tokens=[0]
    )
    follow_tables(storing, step, MIXED)
    assert (storing["a"].table, storing["a"].gap) == ([4, 14, 5, 15], False)
