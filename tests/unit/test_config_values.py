"""Values are read in every spelling that is documented, and in no other."""

import math

import pytest

from lmcache_rs.config import values as v

GIB = 2**30


@pytest.mark.parametrize(
    ("written", "size_bytes"),
    [
        (5, 5 * GIB),
        (0.5, GIB // 2),
        ("5.0", 5 * GIB),
        (" 5 ", 5 * GIB),
        (".5", GIB // 2),
        ("5GB", 5 * 10**9),
        ("5 gb", 5 * 10**9),
        ("5GiB", 5 * GIB),
        ("1.5gib", 3 * GIB // 2),
        ("512MiB", 2**29),
        ("1TB", 10**12),
        ("1TiB", 2**40),
        ("64kb", 64_000),
        ("4096B", 4096),
        ("1e3MB", 10**9),
        ("1024TiB", 2**50),
    ],
)
def test_sizes(written, size_bytes):
    assert v.size().parse(written) == size_bytes


WRONG_SIZES = (
    *(0, -1, math.nan, math.inf, True, None, [], b"5", 10**400),
    *(
        "-5GB",
        "nan",
        "inf",
        "5G",
        "5 GB GB",
        "GB",
        "5e",
        "1e999",
        "5,0",
        "0.1B",
        "1025TiB",
        "9" * 500,
        "\u0665",
    ),
)


@pytest.mark.parametrize("written", WRONG_SIZES)
def test_wrong_sizes(written):
    with pytest.raises(ValueError, match="must be"):
        v.size().parse(written)


def test_size_zero_where_it_means_something():
    assert v.size(zero=True).parse("0") == 0
    with pytest.raises(ValueError, match="must be"):
        v.size(zero=True).parse("0.5B")


@pytest.mark.parametrize("word", ["true", "TRUE", "1", "yes", "On", " on ", 1, True])
def test_true(word):
    assert v.boolean().parse(word) is True


@pytest.mark.parametrize("word", ["enabled", "y", "", "2", 2, 1.0, None, []])
def test_no_boolean(word):
    with pytest.raises(ValueError, match="must be true or false"):
        v.boolean().parse(word)


@pytest.mark.parametrize(
    "written", ["x", "1.5", 1.5, "", True, None, math.inf, math.nan, 2**63, "9" * 50, "0x10"]
)
def test_wrong_integers(written):
    with pytest.raises(ValueError, match="must be a whole number"):
        v.integer().parse(written)


@pytest.mark.parametrize("written", ["x", "", True, None, "inf", math.nan, 10**400, []])
def test_wrong_numbers(written):
    with pytest.raises(ValueError, match="must be a number"):
        v.number().parse(written)


def test_lists():
    assert v.list_of(v.integer()).parse("1, 2,,3") == [1, 2, 3]
    assert v.list_of(v.integer()).parse([1, "2"]) == [1, 2]
    assert v.list_of(v.integer()).parse(7) == [7]
    with pytest.raises(ValueError, match="whole number"):
        v.list_of(v.integer()).parse("1,x")


@pytest.mark.parametrize(
    ("size_bytes", "words"),
    [(5 * GIB, "5 GiB"), (2**40, "1 TiB"), (5 * 10**9, "4.657 GiB"), (1536, "1.5 KiB"), (7, "7 B")],
)
def test_size_words(size_bytes, words):
    assert v.size_words(size_bytes) == words
