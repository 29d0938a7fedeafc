"""The random numbers are Random123's, and each is a function of what it is drawn for alone."""

import numpy as np
import pytest

from sharding.philox import STREAMS, philox, shuffle_keys, uniforms

# Random123 1.14, tests/kat_vectors, philox4x32 with 10 rounds: counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter, key, result):
    assert philox(words(counter), words(key)).tolist() == words(result)


def test_philox_of_many_counters_is_philox_of_each():
    counters = np.array([words(counter) for counter, _, _ in KNOWN_ANSWERS], np.uint64).T
    key = words(KNOWN_ANSWERS[2][1])
    assert philox(counters, key)[:, 2].tolist() == words(KNOWN_ANSWERS[2][2])


def test_a_number_does_not_depend_on_its_batch():
    ids = np.array([7, 2**63 + 5, 0, 123_456_789_012], np.uint64)
    whole = uniforms(ids, 6, seed=1, stream="view", epoch=3, view=1)
    assert whole.shape == (4, 6)
    for i in range(4):
        np.testing.assert_array_equal(uniforms(ids[i : i + 1], 6, seed=1, stream="view", epoch=3, view=1)[0], whole[i])
    # More numbers per id do not change the first ones.
    np.testing.assert_array_equal(uniforms(ids, 9, seed=1, stream="view", epoch=3, view=1)[:, :6], whole)


def test_every_part_of_the_key_matters():
    keys = [dict(seed=1, stream="view", epoch=0, view=0)]
    keys += [dict(keys[0], seed=2), dict(keys[0], seed=1 + 2**32), dict(keys[0], epoch=1), dict(keys[0], view=1)]
    keys += [dict(keys[0], stream=stream) for stream in STREAMS if stream != "view"]
    drawn = [uniforms(np.arange(3), 4, **key).tobytes() for key in keys]
    assert len(set(drawn)) == len(keys)


def test_uniforms_are_uniform_and_unrelated():
    drawn = uniforms(np.arange(100_000), 5, seed=42, stream="view")
    assert drawn.min() >= 0
    assert drawn.max() < 1
    counts = np.stack([np.histogram(column, 64, (0, 1))[0] for column in drawn.T])
    chi_squared = ((counts - 100_000 / 64) ** 2 / (100_000 / 64)).sum(1)  # 63 degrees of freedom
    assert (chi_squared > 25).all()  # not too even
    assert (chi_squared < 120).all()  # nor too uneven: 1 in 50,000 each
    correlation = np.corrcoef(np.vstack([drawn.T, np.roll(drawn[:, 0], 1)]))
    assert np.abs(correlation - np.eye(6)).max() < 0.02


def test_priorities_shuffle():
    order = np.argsort(shuffle_keys(np.arange(10_000), seed=42, stream="order"))
    assert sorted(order) == list(range(10_000))
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.05
    assert (order != np.argsort(shuffle_keys(np.arange(10_000), seed=42, stream="order", epoch=1))).mean() > 0.99


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_a_users_mistake(seed):
    with pytest.raises(ValueError, match="out of range"):
        shuffle_keys(np.arange(3), seed=seed, stream="order")
